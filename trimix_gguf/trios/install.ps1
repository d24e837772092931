# Installs trimix from this folder, without a network:
#   powershell -ExecutionPolicy Bypass -File install.ps1 [FOLDER]
# ASCII only: Windows PowerShell 5.1 reads a script without a mark in the system's old code page.
param([string]$Target = (Join-Path $env:LOCALAPPDATA 'trimix\program'))

$program = Join-Path $PSScriptRoot 'program'
$wheels = Join-Path $program 'wheels'
$env:PYTHONHOME = $null
$env:PYTHONPATH = $null
$env:PIP_CONFIG_FILE = 'nul'

function Stop-Install([string]$Why) {
    [Console]::Error.WriteLine("install.ps1: $Why")
    exit 1
}

# The first Python that the wheels here are for.
$madeFor = @(Get-Content -Encoding UTF8 (Join-Path $program 'made-for.txt'))
$code = "import platform as p, sys; print((p.system() + '-' + p.machine() + ':%d.%d' % sys.version_info[:2]).lower())"
$python = $null
$found = @()
foreach ($try in @('py -3.14', 'py -3.13', 'py -3.12', 'py -3.11', 'python', 'python3')) {
    $name, $option = $try.Split(' ')
    if (-not (Get-Command $name -ErrorAction SilentlyContinue)) { continue }
    $mine = if ($option) { & $name $option -c $code 2>$null } else { & $name -c $code 2>$null }
    if ($LASTEXITCODE -ne 0 -or -not $mine) { continue }
    $found += $mine
    if ($madeFor -contains $mine) { $python = $try; break }
}
if (-not $found) { Stop-Install "no Python here; install Python 3, one of: $madeFor" }
if (-not $python) {
    Stop-Install "the wheels here are for: $madeFor; this computer has: $found; install such a Python, or export again with --for-python"
}

foreach ($line in Get-Content -Encoding UTF8 (Join-Path $wheels 'SHA256SUMS')) {
    $digest, $wheel = $line -split '  ', 2
    $file = Join-Path $wheels $wheel
    if (-not (Test-Path -LiteralPath $file) -or
        (Get-FileHash -Algorithm SHA256 -LiteralPath $file).Hash -ne $digest) {
        Stop-Install "damaged or missing: $wheel; run the same trimix export again, or copy the folder again"
    }
}

# Nothing is deleted in a folder that this script did not make.
$mark = Join-Path $Target 'made-by-trimix'
if ((Test-Path -LiteralPath $Target) -and -not (Test-Path -LiteralPath $mark) -and
    @(Get-ChildItem -Force -LiteralPath $Target).Count) {
    Stop-Install "$Target holds other files; name a folder of its own: install.ps1 FOLDER"
}
New-Item -ItemType Directory -Force -Path $Target | Out-Null
New-Item -ItemType File -Force -Path $mark | Out-Null
foreach ($old in 'Include', 'Lib', 'Scripts', 'share', 'pyvenv.cfg') {
    $path = Join-Path $Target $old
    if (Test-Path -LiteralPath $path) { Remove-Item -Recurse -Force -LiteralPath $path }
}
$name, $option = $python.Split(' ')
if ($option) { & $name $option -m venv $Target } else { & $name -m venv $Target }
if ($LASTEXITCODE -ne 0) { Stop-Install "$python cannot make an environment in $Target" }
Write-Host "installing into $Target ..."
& (Join-Path $Target 'Scripts\python.exe') -m pip --isolated --disable-pip-version-check `
    install -q --no-index --find-links $wheels trimix-gguf
if ($LASTEXITCODE -ne 0) { Stop-Install 'pip could not install it (see above)' }

$trimix = Join-Path $Target 'Scripts\trimix.exe'
[Console]::OutputEncoding = [Text.Encoding]::UTF8
foreach ($line in Get-Content -Encoding UTF8 (Join-Path $program 'trios.txt')) {
    $path, $prompt = $line -split "`t", 2
    $trio = & $trimix import (Join-Path $PSScriptRoot $path)
    if ($LASTEXITCODE -ne 0) { exit 1 }
    Write-Host "`n$trio answers:`n"
    & $trimix generate $prompt --trio $trio -n 40 --temperature 0
    if ($LASTEXITCODE -ne 0) { exit 1 }
    Write-Host "`nGo on with:`n  & `"$trimix`" chat --trio $trio"
}
