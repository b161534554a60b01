# Edgekeep. `make demo` shows it, `make test` tests it, `make check` is what CI
# adds. Tools run by `go run path@version`, so that go.mod stays ours alone.
export CGO_ENABLED = 0
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
LDFLAGS   = -s -w -X main.version=$(VERSION)
NEED      = sh testbench/tools/need.sh
GUESTS    = clang lld wasi-libc libclang-rt-14-dev-wasm32 rustc libstd-rust-dev-wasm32
FUZZTIME ?= 5m
GO_FILES  = $(shell git ls-files '*.go')

.PHONY: build test test-long check demo bench bench-workload model examples fuzz api
build:
	go build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

# DEMO_DIR, DEMO_SECONDS and DEMO_BROKER (nats, mosquitto) may be set.
demo: build
	@$(NEED) swtpm swtpm-tools $(if $(filter mosquitto,$(DEMO_BROKER)),mosquitto)
	@bin/edgekeep demo --dir '$(DEMO_DIR)' --seconds $(or $(DEMO_SECONDS),0) --broker $(or $(DEMO_BROKER),nats)

test:
	@$(NEED) swtpm swtpm-tools tpm2-tools mosquitto mosquitto-clients socat strace zstd python3-cbor2 python3-cryptography $(GUESTS) spin gcc libc6-dev qemu-user-static
	go test ./...

test-long:
	EDGEKEEP_LONG=1 go test -count=1 -timeout 60m ./testbench/...

bench: build
	@$(NEED) swtpm swtpm-tools
	@go run ./testbench/bench

# Figures of workloads: batches, start, and what a move costs. SHORT=1 is quicker.
bench-workload: build
	@$(NEED) swtpm swtpm-tools clang lld wasi-libc libclang-rt-14-dev-wasm32
	@go run ./testbench/bench/workload $(if $(SHORT),-short)

# The model of the move, checked exhaustively, and its mutants. SHORT=1 is quicker.
model:
	@$(NEED) spin gcc libc6-dev
	@go run ./testbench/model/cmd $(if $(SHORT),-short)

# The example workloads, ready for `edgekeep workload pack bin/examples/NAME`.
examples:
	@$(NEED) $(GUESTS)
	@sh workload/examples/build.sh bin/examples

# Every fuzz target for FUZZTIME, one after the other. The go command may report its
# own deadline as a failure when time is up; a finding comes with its input.
fuzz:
	@for pkg in $$(go list ./...); do \
	  for f in $$(go test -list '^Fuzz' $$pkg | grep '^Fuzz'); do \
	    out=$$(go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1x $$pkg 2>&1) || \
	      case "$$out" in *"Failing input"*) echo "$$out"; exit 1;; *"context deadline exceeded"*) ;; *) echo "$$out"; exit 1;; esac; \
	    echo "$$pkg $$f: $$(echo "$$out" | grep execs: | tail -1)"; done; done

check:
	go vet ./...
	@out=$$(go run mvdan.cc/gofumpt@v0.12.0 -l $(GO_FILES)); test -z "$$out" || { echo "gofumpt: $$out"; exit 1; }
	@out=$$(go fix -diff ./... 2>&1); test -z "$$out" || { echo "$$out"; echo "run: go fix ./..."; exit 1; }
	go mod tidy -diff
	go run honnef.co/go/tools/cmd/staticcheck@v0.8.2 ./...
	go run golang.org/x/tools/cmd/deadcode@v0.52.0 -test ./... | { ! grep .; }
	go run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0 run
	@$(MAKE) -s api-text | diff docs/api.txt - || { echo "the API changed: make api, and look at the diff"; exit 1; }

api:
	@$(MAKE) -s api-text > docs/api.txt
api-text:
	@for p in $$(go list ./... | grep -v /cmd/ | grep -v /testbench | grep -v '^edgekeep$$'); do echo "== $$p"; go doc -short $$p; done
