#!/usr/bin/env bash
# Starts or replaces a replica of the compose stack while the others serve:
#   swap-replica.sh NAME [IMAGE]     swap-replica.sh rollout-1 tandem-rollout:0.2.1-cuda
# A running replica drains first: it finishes its requests and gets no new ones. The new replica must
# become healthy and, during a run, serve its newest policy version; otherwise the old image is restored
# and the exit code is 1. IMAGE is recorded in .env, so that `docker compose up` does not undo the swap.
#   SWAP_TIMEOUT_S   how many seconds the new replica may take (default: 1800)
#   FORCE=1          swap even the only healthy replica; a run waits meanwhile
set -euo pipefail
cd "$(dirname "$0")/../.."

say() { echo "$name: $*"; }
fail() { echo "swap-replica: $*" >&2; exit "${code:-2}"; }

# Prints the run on the first line, then one replica per line: address, state, version, detail.
fleet() {
    docker compose exec -T trainer python - <<'PYTHON'
import asyncio
import os

from shared.errors import NotFound
from shared.trainer_client import TrainerClient


async def main() -> None:
    key = os.environ["TANDEM_API_KEY"]
    async with TrainerClient("http://127.0.0.1:8080", api_key=key) as trainer:
        try:
            run = await trainer.run()
            print("run", run.state, run.policy.version)
        except NotFound:
            print("run none 0")
        for replica in (await trainer.replicas()).replicas:
            version = replica.policy.version if replica.policy else 0
            print(replica.id, replica.state, version, replica.detail)


asyncio.run(main())
PYTHON
}

address() {
    local id
    id=$(docker compose ps --quiet "$name")
    docker inspect --format '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}:8000' "$id"
}

replace() {  # uses the image that the environment names
    docker compose up --detach --no-deps --no-build --wait \
        --wait-timeout "$((deadline - SECONDS > 1 ? deadline - SECONDS : 1))" "$name"
}

# Waits until the new replica serves the run's current version or a newer one. Succeeds at once if the
# trainer is not part of this stack or has no active run.
serves() {
    local seen run_state newest wanted=-1 line state=unknown version=0 detail="the trainer does not answer"
    while [[ -n $(docker compose ps --status running --quiet trainer) ]]; do
        if seen=$(fleet 2>/dev/null); then
            read -r _ run_state newest <<<"$seen"
            [[ $run_state == running ]] || return 0
            ((wanted >= 0)) || wanted=$newest
            line=$(grep -F "$(address) " <<<"$seen") || line="- unknown 0 the trainer has not seen it"
            read -r _ state version detail <<<"$line"
            if [[ $state == serving ]] && ((version >= wanted)); then
                say "serves policy version $version"
                return 0
            fi
        fi
        if [[ $state == quarantined ]] || ((SECONDS >= deadline)); then
            say "is $state: $detail"
            return 1
        fi
        sleep 1
    done
}

name=${1:-}
image=${2:-}
services=$(docker compose config --services) || fail "docker compose cannot read the stack: see its message above"
grep -E '^rollout-' <<<"$services" | grep -qxF -- "$name" ||
    fail "NAME must be one of: $(grep -E '^rollout-' <<<"$services" | xargs) (for scaled replicas see deploy/README.md)"
variable=$(tr 'a-z-' 'A-Z_' <<<"$name")_IMAGE
deadline=$((SECONDS + ${SWAP_TIMEOUT_S:-1800}))
if [[ -n $image ]]; then
    docker image inspect "$image" >/dev/null 2>&1 || docker pull "$image" ||
        fail "image $image is not on this host and cannot be pulled; nothing was changed: build or load it first"
fi

old=$(docker compose ps --quiet "$name")
if [[ -n $old ]]; then
    old_image=$(docker inspect --format '{{.Config.Image}}' "$old")
    healthy=$(docker compose ps --format '{{.Service}} {{.Health}}' | sed -n 's/^\(rollout-.*\) healthy$/\1/p')
    [[ $healthy != "$name" || ${FORCE:-} == 1 ]] ||
        fail "$name is the only healthy replica: start another one first, or set FORCE=1 to let a run wait meanwhile"
    say "draining"
    docker compose stop "$name"
    status=$(docker inspect --format '{{.State.ExitCode}}' "$old")
    [[ $status == 0 || $status == 143 ]] || say "the old container exited with code $status"
fi

[[ -z $image ]] || export "$variable=$image"
if ! { replace && serves; }; then
    docker compose logs --no-log-prefix --tail 3 "$name" >&2 || true
    [[ -n $old ]] || code=1 fail "$name did not come up: see the end of its log above"
    export "$variable=$old_image"
    deadline=$((SECONDS + ${SWAP_TIMEOUT_S:-1800}))
    { replace && serves; } ||
        code=1 fail "$name came up neither with ${image:-the new container} nor with $old_image: see the end of its log above"
    code=1 fail "$name did not come up with ${image:-the new container}: see the end of its log above; $old_image serves again"
fi
if [[ -n $image ]]; then
    sed -i "/^$variable=/d" .env
    [[ -z $(tail -c 1 .env) ]] || echo >>.env  # the last line may lack its newline
    echo "$variable=$image" >>.env
fi
say "runs $(docker inspect --format '{{.Config.Image}}' "$(docker compose ps --quiet "$name")") at $(address)"
