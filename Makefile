# Everything here is a line that can be typed by hand; go alone builds and tests: `go build ./cmd/rollcall`, `go test ./...`.

TOOLS := go tool -modfile=deploy/tools/go.mod
LINT  := go tool -modfile=deploy/tools/lint/go.mod golangci-lint
# proto/ is the root of the buf module, and the generator's plugins are named from there.
BUF   := cd proto && go tool -modfile=../deploy/tools/go.mod buf

.DEFAULT_GOAL := help

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## build bin/rollcall
	go build -o bin/rollcall ./cmd/rollcall

.PHONY: test
test: ## the fast suite, as CI runs it
	go test -race -shuffle=on ./...

.PHONY: lint
lint: ## linters and formatting
	$(LINT) run

.PHONY: fmt
fmt: ## format
	$(LINT) fmt

.PHONY: generate
generate: ## generate Go from proto/
	$(BUF) lint
	$(BUF) generate

# The image of a release guards what is written to logs and said to peers: CI compares proto/ with it.
.PHONY: proto-baseline
proto-baseline: ## record proto/ as what must stay readable (at a release)
	$(BUF) build --path command --path peer -o baseline.binpb

.PHONY: plugins
plugins: ## build the sample plugins into bin/plugins
	deploy/plugins/build bin/plugins

.PHONY: clients
clients: ## both Go client libraries and the stock commands' calls against three nodes
	cd deploy/e2e/clients && go vet ./... && go test -count=1 ./...

.PHONY: image
image: ## build the container image rollcall:dev; nothing is pulled
	deploy/image

.PHONY: ci
ci: ## everything that CI runs; `make ci STAGES="lint test"` for a part
	.ci/run $(STAGES)

LENGTH ?= 1h
.PHONY: campaign
campaign: ## faults, reloads and requests without end: `make campaign LENGTH=2h`; needs root
	CI_LENGTH=$(LENGTH) .ci/run campaign
