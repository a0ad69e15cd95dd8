#!/usr/bin/env bash
# CPython 3.11 for Windows under wine, from packages alone: setup.sh TARGET [PACKAGE...]; afterwards TARGET/winpy ARGS... runs it.
#   .ci/windows/setup.sh TARGET numpy==1.26.4 rich windows-curses pytest hypothesis pytest-timeout pytest-xdist
#   PYTHONPATH is the folder that you start it in. Use a pipe: TARGET/winpy prog.py </dev/null 2>&1 | cat
# Limits: wine is not Windows (no ConPTY, no antivirus, no long paths); wine 8 lacks what numpy 2 needs, so numpy 1.26; standard output
# to a regular file fails at start; its console takes no VT sequences (PDCurses draws); keys reach it by WriteConsoleInputW.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd); target=$1; shift
mkdir -p "$target/root/DLLs" "$target/wheel"; target=$(cd "$target" && pwd)
command -v wine >/dev/null && command -v x86_64-w64-mingw32-gcc >/dev/null || {
    apt-get -qq update; apt-get -qq -y install --no-install-recommends wine wine64 gcc-mingw-w64-x86-64 unzip >/dev/null; }
pip_() { python3 -m pip --disable-pip-version-check -q "$@"; }
# A game engine's wheel for Windows carries python311.dll and the standard library's extension modules.
[ -f "$target/root/python311.dll" ] || {
    pip_ download --no-deps --platform win_amd64 --python-version 3.11 --implementation cp --only-binary=:all: -d "$target/wheel" panda3d==1.10.16
    unzip -q -o -j "$target"/wheel/panda3d-*.whl 'deploy_libs/*' -d "$target/root/DLLs"
    mv "$target"/root/DLLs/python3*.dll "$target/root/"; cp "$target"/root/DLLs/*.dll "$target/root/" 2>/dev/null || true; }
# The library's Python part is that of any CPython 3.11.
lib=$(python3.11 -c 'import os; print(os.path.dirname(os.__file__))')
[ -d "$target/root/Lib" ] || { cp -r "$lib" "$target/root/Lib"; rm -rf "$target/root/Lib/lib-dynload" "$target/root/Lib/site-packages"; mkdir -p "$target/root/Lib/site-packages"; }
x86_64-w64-mingw32-gcc -municode -O1 -o "$target/root/python.exe" "$here/launcher.c"
[ $# = 0 ] || pip_ install --upgrade --target "$target/root/Lib/site-packages" --platform win_amd64 --python-version 3.11 --implementation cp \
    --abi cp311 --abi abi3 --abi none --only-binary=:all: "$@"
cat >"$target/winpy" <<W
#!/usr/bin/env bash
export WINEPREFIX=$target/prefix WINEDEBUG=\${WINEDEBUG:--all} WINEARCH=win64 PYTHONDONTWRITEBYTECODE=1 OPENBLAS_NUM_THREADS=1
export PYTHONPATH=\${WINPATH:-"Z:\$(pwd | tr / '\\\\')"}
exec wine $target/root/python.exe "\$@"
W
chmod +x "$target/winpy"
for try in 1 2; do # the first start can leave a broken prefix
    WINEPREFIX=$target/prefix WINEDEBUG=-all WINEARCH=win64 wineboot -i >/dev/null 2>&1 </dev/null || true
    "$target/winpy" -c 'import sys, platform; print(platform.platform(), sys.version.split()[0])' </dev/null 2>&1 | cat | grep Windows && exit 0
    rm -rf "$target/prefix"
done
echo "wine does not start Python" >&2; exit 1
