#!/usr/bin/env bash
# Starts a replica of the compose stack, or replaces it, while the others serve:
#   swap-replica.sh NAME [IMAGE]     swap-replica.sh rollout-1 tandem-rollout:0.1.1-cuda
# One that runs drains first: it finishes what it has and gets nothing new. The new one has to become
# healthy and, while a run is on, to serve its newest policy version; else the old image comes back and
# the exit code is 1. IMAGE is noted in .env, so that `docker compose up` does not undo it.
#   SWAP_TIMEOUT_S   how long the new one may take (1800)
#   FORCE=1          swap the only replica too: a run waits meanwhile
set -euo pipefail
cd "$(dirname "$0")/../.."

say() { echo "$name: $*"; }
fail() { echo "swap-replica: $*" >&2; exit "${code:-2}"; }

# The run on the first line, then one replica per line: address, state, version, detail.
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

replace() {  # with the image of the environment
    docker compose up --detach --no-deps --no-build --wait \
        --wait-timeout "$((deadline - SECONDS > 1 ? deadline - SECONDS : 1))" "$name"
}

# Waits until the new replica serves the version that the run is at now, or a newer one. A trainer that
# is not here, or has no run, asks for nothing.
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
services=$(docker compose config --services) || fail "docker compose cannot read the stack: see above"
grep -E '^rollout-' <<<"$services" | grep -qxF -- "$name" ||
    fail "NAME is one of: $(grep -E '^rollout-' <<<"$services" | xargs) (replicas by number: see deploy/README.md)"
variable=$(tr 'a-z-' 'A-Z_' <<<"$name")_IMAGE
deadline=$((SECONDS + ${SWAP_TIMEOUT_S:-1800}))
if [[ -n $image ]]; then
    docker image inspect "$image" >/dev/null 2>&1 || docker pull "$image" ||
        fail "there is no image $image on this host, and it cannot be pulled: nothing was changed"
fi

old=$(docker compose ps --quiet "$name")
if [[ -n $old ]]; then
    old_image=$(docker inspect --format '{{.Config.Image}}' "$old")
    healthy=$(docker compose ps --format '{{.Service}} {{.Health}}' | sed -n 's/^\(rollout-.*\) healthy$/\1/p')
    [[ $healthy != "$name" || ${FORCE:-} == 1 ]] ||
        fail "$name is the only healthy replica: start another one first, or set FORCE=1 and a run waits meanwhile"
    say "draining"
    docker compose stop "$name"
    status=$(docker inspect --format '{{.State.ExitCode}}' "$old")
    [[ $status == 0 || $status == 143 ]] || say "the old one ended with exit code $status"
fi

[[ -z $image ]] || export "$variable=$image"
if ! { replace && serves; }; then
    docker compose logs --no-log-prefix --tail 3 "$name" >&2 || true
    [[ -n $old ]] || code=1 fail "$name did not come up: its last words are above"
    export "$variable=$old_image"
    deadline=$((SECONDS + ${SWAP_TIMEOUT_S:-1800}))
    { replace && serves; } ||
        code=1 fail "$name came up neither with ${image:-the new container} nor with $old_image: its last words are above"
    code=1 fail "$name did not come up with ${image:-the new container}: its last words are above; $old_image serves again"
fi
if [[ -n $image ]]; then
    sed -i "/^$variable=/d" .env
    [[ -z $(tail -c 1 .env) ]] || echo >>.env  # the last line lacked its end
    echo "$variable=$image" >>.env
fi
say "runs $(docker inspect --format '{{.Config.Image}}' "$(docker compose ps --quiet "$name")") at $(address)"
