# Everything a person or CI does here; `make` lists it. Needs GNU make and Python 3.11 or newer, brings the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
# Some containers set it: then every process of the tests, hundreds of them, would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

# make run MODEL=qwen3-0.6b PORT=9000
MODEL ?= qwen2.5-coder-0.5b-instruct
RECIPE ?= balanced
HOST ?= 127.0.0.1
PORT ?= 8080
BROKER_PORT ?= 1883
# make test ARGS="-k sampler"
ARGS ?=

VENV := .venv
ORACLE_VENV := .venv-oracle
BUNDLE := models/$(MODEL)-$(RECIPE)
UV_VERSION := 0.13.9
PIP := -m pip --disable-pip-version-check --no-input -qq
STAMP := $(VENV)/.installed
ORACLE_STAMP := $(ORACLE_VENV)/.installed
CLIENTS_VENV := .venv-clients
CLIENTS_STAMP := $(CLIENTS_VENV)/.installed
YOCTO_VENV := .venv-yocto
YOCTO_STAMP := $(YOCTO_VENV)/.installed
MANIFESTS_VENV := .venv-manifests
MANIFESTS_STAMP := $(MANIFESTS_VENV)/.installed

.PHONY: help setup model run test test-arm64 test-gpu bench-peers check docs lock oracle clients offline-kit rauc-bundle swupdate-image yocto-lint yocto-wheels check-wheels clean

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | while IFS=$$'\t' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

setup: $(STAMP) ## the environment in .venv, locked with hashes
	@echo "setup: $(VENV) is ready"

$(STAMP): .locks/dev.txt pyproject.toml .ci/make-venv.sh
	@.ci/make-venv.sh $(VENV)
	@echo "setup: installing the locked packages into $(VENV)"
	@$(VENV)/bin/python $(PIP) install --no-deps --require-hashes -r .locks/dev.txt
	@$(VENV)/bin/python $(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

model: $(BUNDLE)/manifest.json ## the demo model, exported to a bundle in models/
	@:

# The export publishes a bundle at once and whole, so a manifest means that it is there.
$(BUNDLE)/manifest.json: | $(STAMP)
	@echo "model: exporting $(MODEL) to $(BUNDLE)"
	@mkdir -p models
	@$(VENV)/bin/qwedge export $(MODEL) --recipe $(RECIPE) -o $(BUNDLE)

run: $(STAMP) ## set everything up and serve the demo model over HTTP and MQTT
	@.ci/need-package.sh mosquitto mosquitto "requests over MQTT" || true
	@.ci/need-package.sh mosquitto-clients mosquitto_pub "the printed MQTT examples" || true
	@.ci/need-package.sh curl curl "the printed HTTP examples" || true
	@$(MAKE) model
	@QWEDGE_MQTT_PORT=$(BROKER_PORT) exec $(VENV)/bin/qwedge serve --bundle $(BUNDLE) --host $(HOST) --port $(PORT) --broker embedded

test: $(STAMP) ## set everything up and run the tests
	@.ci/need-package.sh mosquitto mosquitto "the MQTT tests" || true
	@.ci/need-package.sh mosquitto-clients mosquitto_pub "the tests of the printed examples" || true
	@.ci/need-package.sh curl curl "the tests of the printed examples" || true
	@.ci/need-package.sh chromium chromium "the test of the web page" || true
	@.ci/need-package.sh chromium-driver chromedriver "the test of the web page" || true
	@.ci/need-package.sh systemd systemd-analyze "the tests of firmware-configs" || true
	@.ci/need-package.sh nftables nft "the tests of firmware-configs" || true
	@.ci/need-package.sh shellcheck shellcheck "the tests of firmware-configs" || true
	@.ci/need-package.sh logrotate logrotate "the tests of firmware-configs" || true
	@.ci/need-package.sh iproute2 ip "the tests of firmware-configs" || true
	@.ci/need-package.sh tcc tcc "the test of clock jumps" || true
	@.ci/need-package.sh python3 /usr/bin/python3 "the test of the Debian package" || true
	@.ci/need-package.sh lintian lintian "the test of the Debian package" || true
	@.ci/need-package.sh man-db man "the test of the Debian package" || true
	@.ci/need-package.sh skopeo skopeo "the test of the container image" || true
	@.ci/need-package.sh umoci umoci "the test of the container image" || true
	@.ci/need-package.sh kubernetes-client kubectl "the test of the manifests for k3s" || true
	@$(MAKE) manifests || true
	@.ci/need-package.sh rauc rauc "the tests of firmware-configs" || true
	@.ci/need-package.sh squashfs-tools mksquashfs "the tests of firmware-configs" || true
	@.ci/need-package.sh dbus-daemon dbus-daemon "the tests of firmware-configs" || true
	@.ci/need-package.sh swupdate swupdate "the tests of firmware-configs" || true
	@.ci/need-package.sh cpio cpio "the tests of firmware-configs" || true
	@.ci/need-package.sh openssl openssl "the tests of firmware-configs" || true
	@$(MAKE) yocto-lint || true
	@$(VENV)/bin/python -m pytest $(ARGS)
	@$(if $(ARGS),,.ci/test-oracle.sh)
	@$(if $(ARGS),,.ci/test-clients.sh)

test-gpu: $(STAMP) ## the tests that need a GPU; those of WebGPU run on a processor too
	@.ci/test-gpu.sh $(ARGS)

test-arm64: $(STAMP) ## the runtime on ARM64, by emulation: ARGS="--real models/..." (docs/arm64.md)
	@.ci/arm64/test.sh $(ARGS)

bench-peers: $(STAMP) ## compare with llama.cpp and onnxruntime-genai: ARGS="--model 1.5b --full"
	@.ci/need-package.sh g++ g++ "building llama.cpp"
	@$(VENV)/bin/python -m tests.bench.peers $(ARGS)

check: $(STAMP) ## lint, format, types, and generated documentation in step
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/python .ci/generate_docs.py --check

docs: $(STAMP) ## generate docs/cli.md and docs/configuration.md
	@$(VENV)/bin/python .ci/generate_docs.py

oracle: $(ORACLE_STAMP) ## the environment of `qwedge export --verify`, in .venv-oracle

# torch comes first and without a hash: which build of it (CPU, CUDA) is the machine's choice.
$(ORACLE_STAMP): .locks/oracle.txt pyproject.toml .ci/make-venv.sh
	@.ci/make-venv.sh $(ORACLE_VENV)
	@echo "oracle: installing torch, transformers and optimum into $(ORACLE_VENV)"
	@$(ORACLE_VENV)/bin/python $(PIP) install torch==2.13.0
	@$(ORACLE_VENV)/bin/python $(PIP) install --no-deps --require-hashes -r .locks/oracle.txt
	@$(ORACLE_VENV)/bin/python $(PIP) install --no-deps --editable .
	@touch $@

clients: $(CLIENTS_STAMP) ## the environment of tests/clients, in .venv-clients
	@:

$(CLIENTS_STAMP): .locks/clients.txt pyproject.toml .ci/make-venv.sh
	@.ci/make-venv.sh $(CLIENTS_VENV)
	@echo "clients: installing the locked client libraries into $(CLIENTS_VENV)"
	@$(CLIENTS_VENV)/bin/python $(PIP) install --no-deps --require-hashes -r .locks/clients.txt
	@$(CLIENTS_VENV)/bin/python $(PIP) install --no-deps --editable .
	@touch $@

yocto-lint: $(YOCTO_STAMP) ## the linter of Yocto recipes, in .venv-yocto
	@:

$(YOCTO_STAMP): .locks/yocto.txt .ci/make-venv.sh
	@.ci/make-venv.sh $(YOCTO_VENV)
	@echo "yocto: installing oelint-adv into $(YOCTO_VENV)"
	@$(YOCTO_VENV)/bin/python $(PIP) install --no-deps --require-hashes -r .locks/yocto.txt
	@touch $@

yocto-wheels: $(STAMP) ## the Yocto recipe's list of wheels, from the lock
	@$(VENV)/bin/python .ci/yocto_wheels.py

offline-kit: $(STAMP) ## all that a device needs in one folder: BOARD=raspberry-pi-5 BUNDLE=models/... (docs/firmware.md)
	@mkdir -p dist
	@.ci/offline-kit.sh "$(BOARD)" "$(BUNDLE)" "$(or $(KIT),dist/qwedge-kit-$(BOARD))"

.PHONY: manifests deb oci
manifests: $(MANIFESTS_STAMP) ## the environment that judges manifests, in .venv-manifests
	@:

$(MANIFESTS_STAMP): .locks/manifests.txt .ci/make-venv.sh
	@.ci/make-venv.sh $(MANIFESTS_VENV)
	@echo "manifests: installing the locked tools into $(MANIFESTS_VENV)"
	@$(MANIFESTS_VENV)/bin/python $(PIP) install --no-deps --require-hashes -r .locks/manifests.txt
	@touch $@

deb: $(STAMP) ## the Debian package, in dist/: ARCH=arm64 (or amd64) PYTHON_VERSION=3.11
	@.ci/need-package.sh dpkg dpkg-deb "building a Debian package"
	@.ci/make-deb.sh "$(or $(ARCH),arm64)" dist

oci: $(STAMP) ## the container image, in dist/: ARCH="arm64 amd64" PYTHON_VERSION=3.11 SUITE=bookworm
	@.ci/need-package.sh mmdebstrap mmdebstrap "building a container image"
	@.ci/make-oci.sh dist $(or $(ARCH),arm64 amd64)

rauc-bundle: ## a signed update for RAUC: FROM=kit or bundle CERT=signer.pem KEY=signer.key (firmware-configs/rauc)
	@.ci/need-package.sh rauc rauc "RAUC's bundles"
	@.ci/need-package.sh squashfs-tools mksquashfs "RAUC's bundles"
	@mkdir -p dist
	@firmware-configs/rauc/make-bundle.sh "$(FROM)" "$(or $(OUT),dist/$(notdir $(patsubst %/,%,$(FROM))).raucb)" --cert "$(CERT)" --key "$(KEY)"

swupdate-image: ## a signed update for SWUpdate: FROM=kit or bundle CERT=signer.pem KEY=signer.key (firmware-configs/swupdate)
	@.ci/need-package.sh squashfs-tools mksquashfs "SWUpdate's images"
	@.ci/need-package.sh cpio cpio "SWUpdate's images"
	@mkdir -p dist
	@firmware-configs/swupdate/make-image.sh "$(FROM)" "$(or $(OUT),dist/$(notdir $(patsubst %/,%,$(FROM))).swu)" --cert "$(CERT)" --key "$(KEY)"

check-wheels: $(STAMP) ## check that every locked package of the runtime has a wheel for ARM64
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; .ci/offline-kit.sh wheels aarch64 "$$folder"

LOCK = UV_CUSTOM_COMPILE_COMMAND="make lock" .cache/uv/bin/uv pip compile --quiet --universal --generate-hashes \
	--python-version 3.11 --fork-strategy fewest --no-emit-index-url pyproject.toml

lock: ## resolve pyproject.toml into .locks/
	@.ci/make-venv.sh .cache/uv
	@.cache/uv/bin/python $(PIP) install uv==$(UV_VERSION)
	@$(LOCK) --excludes .locks/device-excludes.txt -o .locks/runtime.txt
	@$(LOCK) --constraints .locks/runtime.txt --extra export -o .locks/export.txt
	@$(LOCK) --constraints .locks/export.txt --extra export --extra dev -o .locks/dev.txt
	@$(LOCK) --extra export --extra optimum --group oracle --excludes .locks/oracle-excludes.txt --no-emit-package torch -o .locks/oracle.txt
	@$(LOCK) --constraints .locks/runtime.txt --group clients -o .locks/clients.txt
	@$(subst pyproject.toml,,$(LOCK)) --group manifests -o .locks/manifests.txt
	@echo "oelint-adv==9.11.2" | $(LOCK:pyproject.toml=-) -o .locks/yocto.txt
	@if grep -nE '^ *--(index-url|extra-index-url|find-links)|https?://' .locks/*.txt; then echo "lock: an index got into .locks/" >&2; exit 1; fi
	@for name in runtime export dev oracle clients manifests; do echo "lock: $$name has $$(grep -c '^[a-z].*==' .locks/$$name.txt) packages"; done

clean: ## remove environments and caches; models stay
	@rm -rf $(VENV) $(ORACLE_VENV) $(CLIENTS_VENV) $(YOCTO_VENV) $(MANIFESTS_VENV) .cache/uv .pytest_cache .mypy_cache .ruff_cache .hypothesis
