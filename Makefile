# Every target that needs the environment goes through `env` or, where training is all that it needs,
# `env-light`. Both cost milliseconds once .venv has what they ask for.
# ARGS goes to the command of a target: make test ARGS='-k router -x'.
# EXTRAS names further extras of pyproject.toml: make env-light EXTRAS='ray dedup'.
# PYTHON, TORCH_INDEX, TORCH_BUILD, CORPUS and SEED, given to make or set in the shell, reach the
# commands as environment variables: make exports both kinds by itself, and an unset one stays unset.

BIN := .venv/bin
CPP := $(wildcard megatron_sffn/ops/*/*.cpp)
SHELL_FILES := .ci/run $(wildcard docker/*.sh examples/*/*.sh tools/*.sh benchmarks/*/*.sh)

.DEFAULT_GOAL := help
.PHONY: help env env-light quickstart bench bench-gpu bench-steps bench-parallel gpu-rehearsal test test-fast test-slow \
	test-megatron check docs format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: ## Make or extend .venv for tests and checks (PYTHON=... chooses the interpreter)
	@tools/setup_env.sh plot dev $(EXTRAS)

env-light: ## Make or extend .venv for training alone, without Ray, DALI, linters (EXTRAS=... TORCH_INDEX=...)
	@tools/setup_env.sh plot $(EXTRAS)

quickstart: env-light ## Text, data set, training on 2 ranks, evaluation, report (CORPUS=... SEED=...)
	@$(BIN)/python -m examples.quickstart $(ARGS)

bench: env-light ## Time of a layer over dense on the CPU, ours and the peers' (ARGS=...)
	@$(BIN)/python -m benchmarks.blocks $(ARGS)

bench-steps: env-light ## Time of whole training steps over a dense model's, ours and Megatron's (ARGS=...)
	@$(BIN)/python -m benchmarks.steps $(ARGS)

bench-gpu: env-light ## The same on a GPU, in bf16 (ARGS=...)
	@$(BIN)/python -m benchmarks.blocks --device cuda --dtype bf16 $(ARGS)

# Without `env`: it has an environment of its own, with the versions of a GPU machine. The command
# itself, on such a machine, needs no make at all: docs/gpu.md.
gpu-rehearsal: ## Dry run of the acceptance of a GPU, under Python 3.12, torch 2.11 and Triton 3.6
	@benchmarks/gpu/rehearse.sh

bench-parallel: env-light ## Time and bytes of a layer on 2 and 4 ranks, ours and Megatron's (ARGS=...)
	@$(BIN)/python -m benchmarks.parallel $(ARGS)

test: env ## Run the tests that need no GPU (ARGS=...)
	@$(BIN)/python -m tests --durations 15 $(ARGS)

test-fast: env ## Run those of the modules that take a few seconds each (ARGS=...)
	@$(BIN)/python -m tests -m "not slow and not long" $(ARGS)

test-slow: env ## Run all: every layout, configuration and launcher, too (ARGS=...)
	@$(BIN)/python -m tests -m "" $(ARGS)

test-megatron: env ## Run the tests with another Megatron (MEGATRON=folder ARGS=...)
	@$(BIN)/python -m tests.second_megatron "$(MEGATRON)" $(ARGS)

# Cheapest first, so that a slip shows at once.
check: env ## Lint, format, schemas, import direction and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror $(CPP)
	@$(BIN)/shellcheck $(SHELL_FILES)
	@$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu
	@$(BIN)/check-jsonschema -q --builtin-schema vendor.github-workflows $(wildcard .github/workflows/*.yml)
	@$(BIN)/check-jsonschema -q --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml \
		.github/ISSUE_TEMPLATE/feature.yml
	@$(BIN)/check-jsonschema -q --builtin-schema vendor.citation-file-format CITATION.cff
	@$(BIN)/check-jsonschema -q --builtin-schema vendor.compose-spec examples/launch/compose.yaml
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/mypy

docs: env ## Build the site of the documentation in site/, with warnings as errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "site/index.html is ready; its search needs a server: $(BIN)/python -m http.server -d site"

format: env ## Rewrite the code in the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CPP)

clean: ## Remove caches and build output; leaves runs/ and .venv
	@rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	@find . \( -name .venv -o -name .venv-torch211 -o -name runs -o -name .git \) -prune -o -type d -name __pycache__ -exec rm -rf {} +
	@echo "Kept runs/ and .venv*; to remove those: rm -rf runs .venv .venv-torch211"
