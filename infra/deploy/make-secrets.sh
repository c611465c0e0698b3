#!/bin/sh
# Makes the secrets of compose.yaml in ./secrets, once: random ones, which git ignores and only you can reach.
# The folder keeps others out; the files can be read by the containers' users, whose numbers are not yours.
set -eu
cd "$(dirname "$0")"
if [ -e secrets ]; then
    echo "infra/deploy/secrets is there already; remove it to make new ones" >&2
    exit 2
fi
random() { head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n'; }
mkdir -m 700 secrets
random > secrets/ray_token
random > secrets/database_password
printf '[default]\naws_access_key_id = nst\naws_secret_access_key = %s\n' "$(random)" > secrets/aws_credentials
chmod 644 secrets/*
