# `make` alone lists what there is to make.

GO ?= go
VERSION := $(shell cat release/VERSION)
PLATFORMS ?= linux/amd64 linux/arm64 darwin/amd64 darwin/arm64
PROGRAMS := nanomdm nanoctl nano2nano mdmsim
FUZZTIME ?= 20s
BENCH ?=
CHAOS ?=
ENGINES := storage/engines/with-engines.sh
# SQLite is C translated to Go, with locks of its own. Watching each of its
# memory accesses makes tests on it three times as slow and finds nothing of ours.
UNWATCHED := -d=checkptr=0 -race=false
RACE := -race '-gcflags=modernc.org/sqlite/lib=$(UNWATCHED)' '-gcflags=modernc.org/libc/...=$(UNWATCHED)'

.PHONY: help build release demo test quick bench chaos chaos-short fuzz lint clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build the programs into bin/, without cgo
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/ ./cmd/...

# The same commit gives the same archives: dates are the commit's. Each program
# knows its version and its commit; see package release.
release: ## static programs for Linux and macOS, checksums and SBOMs, into dist/
	@rm -rf dist && mkdir -p dist
	@date=$$(git log -1 --format=%cI); \
	for platform in $(PLATFORMS); do \
		name=nanomdm-$(VERSION)-$${platform%/*}-$${platform#*/}; \
		echo "building $$name"; \
		for program in $(PROGRAMS); do \
			CGO_ENABLED=0 GOOS=$${platform%/*} GOARCH=$${platform#*/} $(GO) build -trimpath -buildvcs=true \
				-ldflags '-s -w' -o dist/$$name/ ./cmd/$$program || exit 1; \
			$(GO) version -m dist/$$name/$$program | grep -q vcs.revision || \
				{ echo "$$program has no commit: release from a clone, not from a linked worktree"; exit 1; }; \
		done; \
		cp -r LICENSE README.md docs contrib dist/$$name/ && \
		tar -C dist --sort=name --mtime="$$date" --owner=0 --group=0 --numeric-owner --use-compress-program='gzip -n' \
			-cf dist/$$name.tar.gz $$name || exit 1; \
	done
	@for program in $(PROGRAMS); do \
		$(GO) -C release/sbom tool cyclonedx-gomod bin -json -noserial -version v$(VERSION) \
			-output $(CURDIR)/dist/$$program-$(VERSION).cdx.json \
			$(CURDIR)/dist/nanomdm-$(VERSION)-$(firstword $(subst /,-,$(PLATFORMS)))/$$program || exit 1; \
	done
	@cd dist && sha256sum *.tar.gz *.cdx.json > SHA256SUMS && cat SHA256SUMS

demo: build ## a server, three simulated devices and their commands, in seconds
	./bin/mdmsim demo -nanomdm ./bin/nanomdm

test: ## everything, race detector on, with PostgreSQL, MariaDB and MySQL started for it
	$(ENGINES) $(GO) test $(RACE) -timeout 40m ./...

quick: ## everything that needs no database server
	env -u NANOMDM_PGSQL_STORAGE_TEST_DSN -u NANOMDM_MARIADB_STORAGE_TEST_DSN \
		-u NANOMDM_MYSQL_STORAGE_TEST_DSN -u CI $(GO) test ./...

bench: build ## end-to-end on durable engines, into docs/performance.md; pushes; BENCH=-quick
	ENGINES_DURABLE=1 $(ENGINES) ./bin/mdmbench -nanomdm ./bin/nanomdm -out docs/performance.md $(BENCH)
	$(GO) test -run '^$$' -bench . ./push/...

chaos: build ## break clusters and compare what was acknowledged; CHAOS='-scenarios kills -duration 10m'
	cmd/mdmchaos/install.sh
	@# The release before is the commit that cmd/nanomdm/upgrade_test.go names.
	rm -rf bin/before && mkdir -p bin/before
	git archive $$(sed -n 's/^const releaseBefore = "\(.*\)"/\1/p' cmd/nanomdm/upgrade_test.go) | tar -x -C bin/before
	cd bin/before && CGO_ENABLED=0 $(GO) build -o ../nanomdm-before ./cmd/nanomdm
	rm -rf bin/before
	cmd/mdmchaos/shift-clock.sh bin/nanomdm-shifted
	./bin/mdmchaos -nanomdm ./bin/nanomdm -before ./bin/nanomdm-before -shifted ./bin/nanomdm-shifted $(CHAOS)

chaos-short: build ## the same for some minutes: replicas and primaries are killed, connections cut
	cmd/mdmchaos/install.sh postgresql haproxy
	./bin/mdmchaos -nanomdm ./bin/nanomdm -scenarios kills,cuts,failover -duration 50s -devices 12 -operators 3 -seed 7

# go test fuzzes one target at a time, so each is found and run by name. The
# name also goes to -run, for the seeds. Making an input smaller is bounded: it
# counts as no run, and by default takes up to a minute for each input.
fuzz: ## each fuzz target for FUZZTIME (20s, or a count: 3000x)
	@set -e; \
	packages=$$($(GO) list ./...); \
	for package in $$packages; do \
		listed=$$($(GO) test -list '^Fuzz' $$package); \
		for target in $$(printf '%s\n' "$$listed" | grep '^Fuzz' || true); do \
			echo "fuzzing $$package $$target for $(FUZZTIME)"; \
			$(GO) test -run "^$$target\$$" -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 100x $$package; \
		done; \
	done

lint: ## gofmt, go vet, staticcheck
	@unformatted=$$(gofmt -l .); \
	if [ -n "$$unformatted" ]; then echo "not formatted by gofmt:"; echo "$$unformatted"; exit 1; fi
	$(GO) vet ./...
	$(GO) tool staticcheck ./...

clean: ## remove what build made
	rm -rf bin dist
