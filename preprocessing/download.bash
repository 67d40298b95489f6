# shellcheck shell=bash
# Sourced by the scripts that download: whole files, or a sentence on stderr and no file.

die() {
    echo "error: $*" >&2
    exit 2
}

# refuse FILE SENTENCE: no wrong content stays.
refuse() {
    rm -f "$1"
    die "$2"
}

# sha 1 or sha 256, of stdin; Linux and macOS name the program differently.
sha() { if command -v "sha$1sum" >/dev/null; then "sha$1sum"; else shasum -a "$1"; fi | cut -d ' ' -f 1; }

size_of() { wc -c <"$1" | tr -d ' '; }

# The id that git gives a file's content: `git hash-object FILE`, without git.
blob_id() { { printf 'blob %s\0' "$(size_of "$1")" && cat "$1"; } | sha 1; }

# fetch URL FILE: downloads to FILE, which counts for nothing before it is verified; what is there is continued.
fetch() {
    local url=$1 file=$2 status=0
    command -v curl >/dev/null || die "curl is needed for downloads, and is not installed"
    curl --fail --location --silent --show-error --retry 3 --continue-at - --output "$file" "$url" || status=$?
    # 22, 33, 36: the server has no more than what is here, or cannot continue; so once more from the beginning
    if [[ $status =~ ^(22|33|36)$ && -s $file ]]; then
        rm -f "$file"
        status=0
        curl --fail --location --silent --show-error --retry 3 --output "$file" "$url" || status=$?
    fi
    if [[ $status == 22 || $status == 37 ]]; then
        refuse "$file" "$url cannot be had: the server refuses it"
    elif [[ $status != 0 ]]; then
        die "the download of $url broke off (curl: $status): run this again, it continues from there"
    fi
}
