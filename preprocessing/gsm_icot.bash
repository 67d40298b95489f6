#!/usr/bin/env bash
# Downloads GSM8K as augmented by iCoT (da03/Internalize_CoT_Step_by_Step), checks and converts it:
#
#     bash preprocessing/gsm_icot.bash [FOLDER]      # data/gsm_{train,valid,test}.json
#
# Checks the size of the training file and the number of examples in each file. The next call continues an interrupted
# download. PYTHON names the interpreter (default: python3).
set -euo pipefail
here=$(dirname "$0")
source "$here/download.bash"

REPOSITORY=da03/Internalize_CoT_Step_by_Step
MEDIA_URL=${MEDIA_URL:-https://media.githubusercontent.com/media/$REPOSITORY/main/data/gsm8k} # LFS objects
RAW_URL=${RAW_URL:-https://raw.githubusercontent.com/$REPOSITORY/main/data/gsm8k}
folder=${1:-data}

# get SPLIT BASE_URL EXAMPLES [BYTES]
get() {
    local url=$2/$1.txt examples=$3 bytes=${4:-} part=$folder/gsm_$1.txt.part target=$folder/gsm_$1.json
    local size="" status=0
    if [[ -e $target ]]; then
        echo "$target exists already"
        return
    fi
    if [[ -f $part ]]; then size=$(size_of "$part"); fi
    [[ -n $bytes && $size == "$bytes" ]] || fetch "$url" "$part"

    size=$(size_of "$part")
    [[ -z $bytes || $size == "$bytes" ]] ||
        refuse "$part" "$url is not the expected file: it has $size bytes, not $bytes"
    "${PYTHON:-python3}" "$here/gsm_icot.py" "$part" "$target" --expect "$examples" || status=$?
    [[ $status != 2 ]] || refuse "$part" "$url cannot be converted (see above); the download is deleted"
    [[ $status == 0 ]] || die "the converter did not run (see above); the download is kept"
    rm -f "$part"
}

[[ ! -e $folder || -d $folder ]] || die "$folder is not a folder"
mkdir -p "$folder"
get valid "$RAW_URL" 500
get test "$RAW_URL" 1319
get train "$MEDIA_URL" 385620 87805358
