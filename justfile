# `just` comes with the dev extra: .venv/bin/just check

python := env("PYTHON", if path_exists(".venv/bin/python") == "true" { ".venv/bin/python" } else { "python3" })

# list the recipes
default:
    @just --justfile "{{ justfile() }}" --list

# everything CI checks besides the tests: lint, format, types, floors, and counts of what must not grow
check:
    {{ python }} -m ruff check .
    {{ python }} -m ruff format --check .
    {{ python }} -m mypy
    {{ python }} -c "import sys; from importlinter.cli import lint_imports_command as run; sys.exit(run())"
    {{ python }} tests/house.py

# the tests; `just test tests/tables -x` passes its arguments on
test *args:
    {{ python }} -m pytest {{ args }}

# the tests that take minutes
test-slow *args:
    {{ python }} -m pytest -m slow {{ args }}

# every stage killed at every operation on its files, and run again; takes minutes, prints a table, fails where bytes differ
crash-sweep *args:
    {{ python }} tests/sweeps/crash.py {{ args }}

# hundreds of damages to every kind of file that capfilt reads; takes minutes, prints a table, fails where one gets through
fuzz *args:
    {{ python }} tests/sweeps/fuzz.py {{ args }}

# CLIP's layout against open_clip, which brings a torchvision of its own, so it is kept apart from what is installed
test-open-clip:
    #!/usr/bin/env bash
    set -euo pipefail
    scratch="$(mktemp -d)"
    trap 'rm -rf "${scratch}"' EXIT
    {{ python }} -m pip install --quiet --no-deps --target "${scratch}" open-clip-torch ftfy wcwidth
    PYTHONPATH="${scratch}${PYTHONPATH:+:${PYTHONPATH}}" {{ python }} -m pytest tests/models/interop/test_open_clip.py

# the whole loop on the generated world, into DIR
quickstart dir="quickstart":
    {{ python }} -m capfilt quickstart --out "{{ dir }}"

# every benchmark at its quick size; each prints its own table and fails on a missed target
bench:
    #!/usr/bin/env bash
    set -euo pipefail
    status=0
    for script in benchmarks/[a-z]*.py; do
        echo "== ${script}"
        {{ python }} "${script}" --quick || status=1
    done
    exit "${status}"

# write schemas/*.sql from the contracts
schemas:
    {{ python }} tests/schemas.py

# put imports and layout in order
format:
    {{ python }} -m ruff check --fix .
    {{ python }} -m ruff format .
