#!/usr/bin/env bash
# Fetches models that were released with the paper into pretrained/, and reports each one's size and SHA-256.
#
#   bash scripts/download.sh --list
#   bash scripts/download.sh deit_4.2G [MORE NAMES]
#   bash scripts/download.sh --folder /big/disk deit_4.2G
#
# A file that is there is only reported. An interrupted download goes on where it stopped, in NAME.part; the final
# name is given once all is there. With a line for it in SHA256SUMS beside it, a file must match.
# ISOMORPHIC_RELEASE=https://some.mirror/folder fetches from there instead.
# It needs curl or wget and no Python: the one script that leaves setup.sh aside.
set -euo pipefail
here="${PWD%/}"
cd "$(dirname "$0")/.."

names=(deit_4.2G deit_2.6G deit_1.2G deit_0.6G convnext_small_8.5G convnext_tiny_4.2G)
release="${ISOMORPHIC_RELEASE:-https://github.com/VainF/Isomorphic-Pruning/releases/download/v0.1}"
folder=pretrained

fail() {
  echo "download: $1" >&2
  exit "${2:-1}"
}

# fetch ADDRESS FILE: goes on with FILE if there is some of it. Prints nothing, or why it failed.
fetch() {
  if [ "$fetcher" = curl ]; then fetch_with_curl "$@"; else fetch_with_wget "$@"; fi
}

fetch_with_curl() {
  local status=0 answer quiet=(--silent)
  [ ! -t 2 ] || quiet=(--progress-bar)
  answer="$(curl "${quiet[@]}" --fail --location --connect-timeout 20 --speed-limit 1 --speed-time 60 \
    --continue-at - --output "$2" --write-out '%{http_code}' "$1")" || status=$?
  if [ -s "$2" ] && { [ "$status" = 33 ] || [ "$answer" = 416 ]; }; then # the server cannot go on from there
    : >"$2"
    fetch_with_curl "$@"
    return
  fi
  case "$status" in
    0) ;;
    22) echo "the server answers with HTTP status $answer" ;;
    23) echo "cannot write $2" ;;
    18 | 28 | 55 | 56 | 92) echo "the connection broke" ;;
    *) echo "there is no network, or the server cannot be reached" ;;
  esac
  return "$status"
}

fetch_with_wget() {
  local status=0
  wget -q -c -t 1 -T 60 -O "$2" "$1" || status=$?
  case "$status" in
    0) ;;
    3) echo "cannot write $2" ;;
    8) echo "the server answers that it has no such file" ;;
    *) if [ -s "$2" ]; then echo "the connection broke"; else
      echo "there is no network, or the server cannot be reached"
    fi ;;
  esac
  return "$status"
}

checksum() {
  if command -v sha256sum >/dev/null; then sha256sum <"$1"; else shasum -a 256 <"$1"; fi | cut -d ' ' -f 1
}

# listed NAME: the checksum that SHA256SUMS has for NAME, if any. Fails if a line that mentions NAME says anything else.
listed() {
  local found name="${1//./[.]}" sums="$folder/SHA256SUMS"
  [ -e "$sums" ] || return 0
  found="$(tr -d '\r' 2>/dev/null <"$sums" | sed -n "/$name/{s/^\([0-9A-Fa-f]\{64\}\) [ *]$name\$/\1/;p;}" |
    tr A-F a-f | sort -u)" || fail "cannot read $sums"
  [[ "$found" =~ ^([0-9a-f]{64})?$ ]] ||
    fail "$sums must have one checksum for $1, as 64 hexadecimal digits, two spaces and the name: correct it"
  echo "$found"
}

# report FILE NAME KNOWN: size and checksum of FILE, which is or becomes NAME. Fails if KNOWN is another one.
report() {
  local sum known="$3" sums="$folder/SHA256SUMS"
  sum="$(checksum "$1")"
  echo "$folder/$2: $(($(wc -c <"$1"))) bytes, SHA-256 $sum"
  if [ -z "$known" ]; then
    echo "  The release names no checksums. To hold copies against this one, add this line to $sums:"
    echo "$sum  $2"
  elif [ "$known" = "$sum" ]; then
    echo "  as in $sums"
  else
    return 1
  fi
}

# download NAME: one file of the release.
download() {
  local file="$1_isomorphic.pth" part reason known
  part="$folder/$file.part"
  known="$(listed "$file")"
  if [ -e "$folder/$file" ]; then
    [ -f "$folder/$file" ] || fail "$folder/$file is not a file: move it away"
    report "$folder/$file" "$file" "$known" ||
      fail "$folder/$file is not the file in $folder/SHA256SUMS: remove it to fetch it anew"
    return
  fi
  { exec 9>>"$part"; } 2>/dev/null || fail "cannot write $part"
  ! command -v flock >/dev/null || flock -n 9 || fail "another download of $file is running"
  if ! reason="$(fetch "$release/$file" "$part")"; then
    if [ -s "$part" ]; then reason="$reason (the next call goes on from $part)"; else rm -f "$part"; fi
    fail "cannot fetch $release/$file: $reason"
  fi
  if ! report "$part" "$file" "$known"; then
    rm -f "$part"
    fail "what came is not the file in $folder/SHA256SUMS, and is removed"
  fi
  mv "$part" "$folder/$file"
}

wanted=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' scripts/download.sh && exit ;;
    --list) printf '%s\n' "${names[@]}" && exit ;;
    --folder)
      [ -n "${2:-}" ] || fail "--folder needs a folder" 2
      case "$2" in /*) folder="$2" ;; *) folder="$here/$2" ;; esac
      shift
      ;;
    *) wanted+=("${1%_isomorphic.pth}") ;;
  esac
  shift
done
[ ${#wanted[@]} -gt 0 ] || fail "which file? One or more of: ${names[*]}" 2
for name in "${wanted[@]}"; do
  [[ "$name" != *" "* && " ${names[*]} " == *" $name "* ]] || fail "unknown name $name; the release has: ${names[*]}" 2
done
mkdir -p "$folder" 2>/dev/null && [ -w "$folder" ] || fail "cannot write to $folder"
fetcher="$(command -v curl || command -v wget)" || fail "neither curl nor wget is installed: install one of them"
fetcher="$(basename "$fetcher")"
for name in "${wanted[@]}"; do
  download "$name"
done
