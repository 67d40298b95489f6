# shellcheck shell=bash
# Sourced by the download scripts. A file is downloaded completely, or the script stops with a message on stderr.

die() {
    echo "error: $*" >&2
    exit 2
}

# refuse FILE MESSAGE: deletes a file with wrong content, then stops.
refuse() {
    rm -f "$1"
    die "$2"
}

size_of() { wc -c <"$1" | tr -d ' '; }

# blob_id FILE: the same as `git hash-object FILE`, without git. Linux and macOS name the SHA-1 program differently.
blob_id() {
    { printf 'blob %s\0' "$(size_of "$1")" && cat "$1"; } |
        if command -v sha1sum >/dev/null; then sha1sum; else shasum -a 1; fi | cut -d ' ' -f 1
}

# fetch URL FILE: downloads to FILE, which the caller verifies; continues an existing FILE.
fetch() {
    local url=$1 file=$2 status=0
    command -v curl >/dev/null || die "curl is needed for downloads, and is not installed"
    curl --fail --location --silent --show-error --retry 3 --continue-at - --output "$file" "$url" || status=$?
    # 22, 33, 36: the server has no more bytes, or cannot continue; download once more from the beginning
    if [[ $status =~ ^(22|33|36)$ && -s $file ]]; then
        rm -f "$file"
        status=0
        curl --fail --location --silent --show-error --retry 3 --output "$file" "$url" || status=$?
    fi
    if [[ $status == 22 || $status == 37 ]]; then
        refuse "$file" "$url cannot be downloaded: the server refuses it"
    elif [[ $status != 0 ]]; then
        die "the download of $url was interrupted (curl: $status): run this again to continue it"
    fi
}
