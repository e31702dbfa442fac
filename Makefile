# Everything a user does; each target sets itself up first, in .venv, from requirements.lock.
#
#   make reproduce   every table and figure of both papers that is reproduced so far, then the website
#   make test        the gates and the tests
#   make docs        the website, in _docs/
#   make lab         JupyterLab with the tutorials
#   make bench       the solvers, timed on this machine
#   make clean       remove what was built (not .venv, not figures/)
#   make lock        resolve settings.ini again into requirements.lock and environment.yml
#
# All that is needed is Python 3.11 or newer and make. Another Python: make test PYTHON=/path/to/python3

.PHONY: reproduce test docs lab bench clean lock
.DEFAULT_GOAL := test

PY := .venv/bin/python
PROFILE ?= quick

# The stamp carries what the environment was made from and where, so that a changed lock, a changed
# settings.ini or a moved checkout is noticed; an environment whose Python has gone counts as absent.
KEY := $(shell { cat requirements.lock settings.ini setup.py; pwd; } | cksum | cut -d' ' -f1)
READY := .venv/.ready-$(KEY)
ifneq ($(wildcard .venv),)
$(shell $(PY) -c 0 2>/dev/null || rm -f .venv/.ready-*)
endif

CANDIDATES := $(if $(PYTHON),"$(PYTHON)",python3.13 python3.12 python3.11 python3 python)
define FIND_PYTHON
for name in $(CANDIDATES); do \
  if "$$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then python="$$name"; break; fi; \
done; \
if [ -z "$$python" ]; then \
  echo 'No Python 3.11, 3.12 or 3.13 was found among: $(CANDIDATES). Install one, or name it: make test PYTHON=/path/to/python3' >&2; exit 1; \
fi; \
if ! "$$python" -c 'import venv, ensurepip' 2>/dev/null; then \
  echo "$$python has no venv and ensurepip. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
fi
endef

$(READY): export PIP_DISABLE_PIP_VERSION_CHECK := 1
$(READY): export PIP_ROOT_USER_ACTION := ignore
$(READY):
	@$(FIND_PYTHON); echo "Setting up .venv with $$python; this happens once and takes some minutes."; \
	"$$python" -m venv .venv || { rm -rf .venv; exit 1; }
	@$(PY) -m pip install --quiet --progress-bar off --require-hashes -r requirements.lock
	@$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@rm -f .venv/.ready-* && touch $@ && echo "Ready."

reproduce: $(READY)
	$(PY) -m medmatting reproduce --profile $(PROFILE)
	$(PY) nbs/_website/build.py

test: $(READY)
	@$(PY) -m pytest

docs: $(READY)
	$(PY) nbs/_website/build.py

lab: $(READY)
	$(PY) -m jupyterlab nbs/tutorials

bench: $(READY)
	$(PY) -c "from medmatting.bench import main; main()"

lock: $(READY)
	$(PY) tests/requirements.py

clean:
	rm -rf build _docs _proc .pytest_cache .hypothesis .snakemake
	find medmatting nbs tests -name __pycache__ -type d -prune -exec rm -rf {} +
