#!/usr/bin/env bash
# Downloads the authors' ProsQA files (facebookresearch/coconut, MIT) and verifies their git blob ids:
#
#     bash preprocessing/prosqa_official.bash [FOLDER]      # data/prosqa_{train,valid,test}.json
#
# The next call continues an interrupted download. No file appears before all three are verified.
set -euo pipefail
source "$(dirname "$0")/download.bash"

BASE_URL=${BASE_URL:-https://raw.githubusercontent.com/facebookresearch/coconut/main/data}
folder=${1:-data}

blob_of() {
    case $1 in
        train) echo cf26632b9d3f4e812966563eed769b1cfe40c624 ;;
        valid) echo 8df0c62fd6a6c55bfc31345181f505185c4efbd7 ;;
        test) echo 73ff837a94b1f10e604a6d31a4c2fa6c131b687f ;;
    esac
}

[[ ! -e $folder || -d $folder ]] || die "$folder is not a folder"
mkdir -p "$folder"
missing=""
for split in valid test train; do
    file=$folder/prosqa_$split.json
    if [[ ! -e $file ]]; then
        missing="$missing $split"
    elif [[ ! -f $file || $(blob_id "$file") != "$(blob_of "$split")" ]]; then
        die "$file exists and is not the authors' (generated?): move it away, or name another folder"
    fi
done
for split in $missing; do
    url=$BASE_URL/prosqa_$split.json part=$folder/prosqa_$split.json.part
    fetch "$url" "$part"
    found=$(blob_id "$part")
    [[ $found == "$(blob_of "$split")" ]] ||
        refuse "$part" "$url is not the authors' file: its blob id is $found, not $(blob_of "$split")"
done
for split in $missing; do
    mv "$folder/prosqa_$split.json.part" "$folder/prosqa_$split.json"
done
for split in train valid test; do
    echo "$folder/prosqa_$split.json: the authors' file"
done
