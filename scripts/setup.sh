#!/usr/bin/env bash
# Makes .venv in the repository and installs what the requirements ask for, when it is missing or outdated.
#
#   bash scripts/setup.sh          prepare the environment
#   source scripts/setup.sh        the same, and set $PYTHON: how every other script begins
#
# A second call returns at once. Whatever environment is active, the repository's own is used, except that
#   ISOMORPHIC_PYTHON=/path/to/python
# uses that interpreter as it is and installs nothing (for clusters and containers), and
#   ISOMORPHIC_OLDEST=1
# makes .venv-oldest instead, with the oldest versions that the requirements allow (`bash scripts/test.sh --oldest`).
#
# After sourcing, $PYTHON is the interpreter's absolute path and its folder comes first in PATH. Scripts source this
# right after their one cd; where their user stood, and what they gave, is noted for the commands: a relative path in the
# user's own flags starts from there (isomorphic/commands/user_paths.py).

_setup_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
_setup_name=".venv${ISOMORPHIC_OLDEST:+-oldest}"
_setup_venv="$_setup_root/$_setup_name"
_setup_constraints="$_setup_root/constraints${ISOMORPHIC_OLDEST:+-oldest}.txt"
_setup_stamp="$_setup_venv/installed" # written last: without it the environment counts as unfinished

_setup_fail() {
  echo "setup: $1" >&2
  return 1
}

# The state that the stamp records: the interpreter's version and every file that decides what is installed.
_setup_state() {
  { "$_setup_venv/bin/python" -V && cat "$_setup_root"/requirements*.txt "$_setup_constraints"; } 2>&1 | cksum
}

_setup_is_current() {
  [ -x "$_setup_venv/bin/python" ] && [ -f "$_setup_stamp" ] && [ "$(cat "$_setup_stamp")" = "$(_setup_state)" ]
}

_setup_check_python() {
  command -v python3 >/dev/null || _setup_fail "python3 is not on PATH: install Python 3.10 or newer" || return 1
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    _setup_fail "$(python3 -V 2>&1) is too old: put a python3 of 3.10 or newer first in PATH" || return 1
  python3 -c 'import ensurepip, venv' 2>/dev/null ||
    _setup_fail "python3 lacks its venv module: install it (Debian, Ubuntu: apt install python3-venv)"
}

_setup_install() {
  local state constraints=(-c "$_setup_constraints")
  _setup_check_python || return 1
  if [ ! -f "$_setup_stamp" ] || ! "$_setup_venv/bin/python" -c 'import pip' 2>/dev/null; then
    echo "setup: making $_setup_name with $(python3 -V 2>&1) and installing into it (a few minutes, once)" >&2
    python3 -m venv --clear "$_setup_venv" || _setup_fail "python3 could not make $_setup_venv" || return 1
  else
    echo "setup: the requirements have changed, updating $_setup_name" >&2
    rm -f "$_setup_stamp"
  fi
  state="$(_setup_state)"
  # The exact tested set needs Python 3.11; 3.10 takes the newest versions inside the ranges. The oldest set does not.
  [ -n "${ISOMORPHIC_OLDEST:-}" ] ||
    "$_setup_venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || constraints=()
  "$_setup_venv/bin/python" -m pip install -qq --disable-pip-version-check \
    -r "$_setup_root/requirements-dev.txt" -e "$_setup_root" ${constraints[@]+"${constraints[@]}"} ||
    _setup_fail "pip could not install the requirements (its message is above); run this again when it can" || return 1
  echo "$state" >"$_setup_stamp.new" && mv "$_setup_stamp.new" "$_setup_stamp"
}

# One installer at a time where flock exists: the second waits, then finds the work done. pip inherits the lock,
# so that it is held until pip is gone, even when this shell was killed.
_setup_install_alone() (
  if command -v flock >/dev/null; then
    exec 9>"$_setup_root/.venv.lock" || _setup_fail "cannot write to $_setup_root" || exit 1
    flock -n 9 || { echo "setup: waiting for another setup to finish" >&2 && flock 9; }
  fi
  _setup_is_current || _setup_install
)

_setup_main() {
  if [ -n "${ISOMORPHIC_PYTHON:-}" ]; then
    PYTHON="$(command -v "$ISOMORPHIC_PYTHON")" ||
      _setup_fail "ISOMORPHIC_PYTHON=$ISOMORPHIC_PYTHON is not a program: give the path of a python" || return 1
    export PYTHONPATH="$_setup_root${PYTHONPATH:+:$PYTHONPATH}" # .venv holds the package; this one may not
  else
    _setup_is_current || _setup_install_alone || return 1
    PYTHON="$_setup_venv/bin/python"
    export VIRTUAL_ENV="$_setup_venv"
  fi
  PYTHON="$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")"
  export PYTHON PATH="$(dirname "$PYTHON"):$PATH"
}

# user_words WORD…: notes the words that a script passes on from its user, each ended by a separator.
user_words() {
  ISOMORPHIC_USER_WORDS="$([ $# -eq 0 ] || printf '%s\037' "$@")"
  export ISOMORPHIC_USER_WORDS
}

_setup_main || return 1 2>/dev/null || exit 1
if [ "${#BASH_SOURCE[@]}" -gt 1 ] && [ -z "${ISOMORPHIC_USER_FOLDER:-}" ]; then # not a script that another one called
  export ISOMORPHIC_USER_FOLDER="${OLDPWD:-$PWD}"
  user_words "$@"
fi
