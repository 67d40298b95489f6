#!/usr/bin/env bash
# Downloads GSM8K as iCoT augmented it (da03/Internalize_CoT_Step_by_Step), verifies and converts it:
#
#     bash preprocessing/gsm_icot.bash [FOLDER]      # data/gsm_{train,valid,test}.json
#
# Verified are the size of the training file and the number of examples of each. The hashes of files that passed are
# kept in FOLDER/gsm_icot.sha256, and later downloads must agree with them. A broken download is continued by the next
# call. PYTHON names the interpreter (default: python3).
set -euo pipefail
here=$(dirname "$0")
source "$here/download.bash"

REPOSITORY=da03/Internalize_CoT_Step_by_Step
MEDIA_URL=${MEDIA_URL:-https://media.githubusercontent.com/media/$REPOSITORY/main/data/gsm8k} # LFS objects
RAW_URL=${RAW_URL:-https://raw.githubusercontent.com/$REPOSITORY/main/data/gsm8k}
folder=${1:-data}
hashes=$folder/gsm_icot.sha256

# get SPLIT BASE_URL EXAMPLES [BYTES]
get() {
    local split=$1 url=$2/$1.txt examples=$3 bytes=${4:-} part=$folder/gsm_$1.txt.part target=$folder/gsm_$1.json
    local size="" found known="" status=0
    if [[ -e $target ]]; then
        echo "$target is there already"
        return
    fi
    if [[ -f $part ]]; then size=$(size_of "$part"); fi
    [[ -n $bytes && $size == "$bytes" ]] || fetch "$url" "$part"

    size=$(size_of "$part")
    [[ -z $bytes || $size == "$bytes" ]] ||
        refuse "$part" "$url is not the expected file: it has $size bytes, not $bytes"
    found=$(sha 256 <"$part")
    if [[ -f $hashes ]]; then known=$(sed -n "s/  gsm_$split.txt\$//p" "$hashes"); fi
    [[ -z $known || $found == "$known" ]] ||
        refuse "$part" "$url has changed: its SHA-256 is $found, but $hashes says $known"
    "${PYTHON:-python3}" "$here/gsm_icot.py" "$part" "$target" --expect "$examples" || status=$?
    [[ $status != 2 ]] || refuse "$part" "$url cannot be converted (see above), so nothing of it is kept"
    [[ $status == 0 ]] || die "the converter did not run (see above); the download is kept"

    if [[ -z $known ]]; then
        { if [[ -f $hashes ]]; then cat "$hashes"; fi && echo "$found  gsm_$split.txt"; } >"$hashes.part"
        mv "$hashes.part" "$hashes"
    fi
    rm -f "$part"
}

[[ ! -e $folder || -d $folder ]] || die "$folder is no folder"
mkdir -p "$folder"
get valid "$RAW_URL" 500
get test "$RAW_URL" 1319
get train "$MEDIA_URL" 385620 87805358
