#!/usr/bin/env bash
# Creates .env from .env.example with a random key, unless .env exists, and records in it which files
# `docker compose` reads.
#   make_env.sh [cpu | one-gpu | scale | cpu+scale]
set -euo pipefail
cd "$(dirname "$0")/../.."

files=docker-compose.yml
stack=${1:-}
for name in ${stack//+/ }; do
    if [[ ! -f deploy/compose/$name.yml ]]; then
        known=(deploy/compose/*.yml)
        known=("${known[@]##*/}")
        echo "There is no stack $name: set STACK to one of ${known[*]%.yml}, or two joined by +" >&2
        exit 2
    fi
    files+=:deploy/compose/$name.yml
done

if [[ ! -f .env ]]; then
    key=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
    (umask 077 && sed "s/^TANDEM_API_KEY=\$/TANDEM_API_KEY=$key/" .env.example >.env)
    echo "Created .env with a new TANDEM_API_KEY."
fi
if [[ -n $stack ]]; then
    sed -i '/^COMPOSE_FILE=/d' .env
    [[ -z $(tail -c 1 .env) ]] || echo >>.env  # the last line may lack its newline
    echo "COMPOSE_FILE=$files" >>.env
fi
# Docker would create these folders too, but owned by root.
while read -r folder; do
    mkdir -p "$folder"
done < <(sed -nE 's/^TANDEM_(MODELS|DATA)_DIR=//p' .env)
