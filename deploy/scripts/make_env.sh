#!/usr/bin/env bash
# Makes .env from .env.example with a random key, unless there is one, and notes in it which files
# `docker compose` reads from then on.
#   make_env.sh [cpu | one-gpu | scale | cpu+scale]
set -euo pipefail
cd "$(dirname "$0")/../.."

files=docker-compose.yml
stack=${1:-}
for name in ${stack//+/ }; do
    if [[ ! -f deploy/compose/$name.yml ]]; then
        known=(deploy/compose/*.yml)
        known=("${known[@]##*/}")
        echo "There is no stack $name: STACK is one of ${known[*]%.yml}, or two joined by +" >&2
        exit 2
    fi
    files+=:deploy/compose/$name.yml
done

if [[ ! -f .env ]]; then
    key=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
    (umask 077 && sed "s/^TANDEM_API_KEY=\$/TANDEM_API_KEY=$key/" .env.example >.env)
    echo "Made .env with a new TANDEM_API_KEY."
fi
if [[ -n $stack ]]; then
    sed -i '/^COMPOSE_FILE=/d' .env
    [[ -z $(tail -c 1 .env) ]] || echo >>.env  # the last line lacked its end
    echo "COMPOSE_FILE=$files" >>.env
fi
# Docker would make them too, for root alone.
while read -r folder; do
    mkdir -p "$folder"
done < <(sed -nE 's/^TANDEM_(MODELS|DATA)_DIR=//p' .env)
