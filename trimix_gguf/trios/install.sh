# Installs trimix from this folder, without a network: sh install.sh [FOLDER]
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
target=${1:-${XDG_DATA_HOME:-$HOME/.local/share}/trimix/program}
tab=$(printf '\t')
unset PYTHONHOME PYTHONPATH

stop() {
  printf 'install.sh: %s\n' "$1" >&2
  exit 1
}

# The first Python that the wheels here are for.
python='' found=''
for name in python3.14 python3.13 python3.12 python3.11 python3 python; do
  this=$("$name" -c 'import platform as p, sys
print(("%s-%s:%d.%d" % (p.system(), p.machine(), *sys.version_info[:2])).lower())' 2>/dev/null) || continue
  found="$found $this"
  if grep -qxF "$this" "$here/program/made-for.txt"; then python=$name; break; fi
done
made_for=$(tr '\n' ' ' <"$here/program/made-for.txt")
[ -n "$found" ] || stop "no Python here; install Python 3, one of: $made_for"
[ -n "$python" ] || stop "the wheels here are for: $made_for- this computer has:$found; install such a Python, or export again with --for-python"

if command -v sha256sum >/dev/null; then sums() { LC_ALL=C sha256sum -c SHA256SUMS 2>/dev/null; }
elif command -v shasum >/dev/null; then sums() { LC_ALL=C shasum -a 256 -c SHA256SUMS 2>/dev/null; }
else sums() { echo 'install.sh: no sha256sum here; the wheels are not compared' >&2; }
fi
if ! compared=$(cd "$here/program/wheels" && sums); then
  bad=$(printf '%s\n' "$compared" | sed -n 's/: FAILED.*//p' | tr '\n' ' ')
  stop "damaged or missing: ${bad:-SHA256SUMS }- run the same trimix export again, or copy the folder again"
fi

# Nothing is deleted in a folder that this script did not make.
if [ -e "$target" ] && [ ! -e "$target/made-by-trimix" ] && [ -n "$(ls -A "$target")" ]; then
  stop "$target holds other files; name a folder of its own: sh install.sh FOLDER"
fi
mkdir -p "$target"
target=$(CDPATH='' cd -- "$target" && pwd)
: >"$target/made-by-trimix"
(cd "$target" && rm -rf bin include lib lib64 share pyvenv.cfg)
"$python" -m venv "$target" >/dev/null ||
  stop "$python cannot make an environment; install its venv (Debian, Ubuntu: the package python3-venv)"
echo "installing into $target ..." >&2
PIP_CONFIG_FILE=/dev/null "$target/bin/python" -m pip --isolated --disable-pip-version-check \
  install -q --no-index --find-links "$here/program/wheels" trimix-gguf ||
  stop "pip could not install it (see above)"

while IFS=$tab read -r path prompt; do
  trio=$("$target/bin/trimix" import "$here/$path")
  printf '\n%s answers:\n\n' "$trio" >&2
  "$target/bin/trimix" generate "$prompt" --trio "$trio" -n 40 --temperature 0 </dev/null
  printf '\nGo on with:\n  "%s" chat --trio %s\n' "$target/bin/trimix" "$trio" >&2
done <"$here/program/trios.txt"
