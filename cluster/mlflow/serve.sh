#!/bin/bash
# A tracking server with PostgreSQL as its store and passwords for its users:
#
#     pip install -c constraints.txt -e '.[server]'
#     export GRADMIX_MLFLOW_STORE=postgresql://mlflow:PASSWORD@localhost/mlflow
#     export MLFLOW_AUTH_ADMIN_PASSWORD=...          # of the user admin; for the first start only
#     bash cluster/mlflow/serve.sh
#
# createdb.sql makes the database. Clients name the server by --tracking.uri http://HOST:PORT (the sweep:
# --base.tracking.uri) and find their name and password in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or in
# ~/.mlflow/credentials, which is the way on the nodes of a cluster. `/signup` on the server's page adds users.
#
# Settings, from the environment:
#     GRADMIX_MLFLOW_STORE       PostgreSQL database of runs and models
#     GRADMIX_MLFLOW_FOLDER      what the server keeps beside it; default: mlflow-server
#     GRADMIX_MLFLOW_ARTIFACTS   files of runs and models: a folder or s3://BUCKET/PATH (needs boto3); default: below
#                                GRADMIX_MLFLOW_FOLDER
#     GRADMIX_MLFLOW_HOST        address to listen on; default 127.0.0.1, this machine alone. For a cluster its address
#                                in the inner network. To the outside only behind a proxy that speaks TLS.
#     GRADMIX_MLFLOW_PORT        default 5000
#     GRADMIX_MLFLOW_WORKERS     processes that answer; default 2
#     GRADMIX_MLFLOW_NAMES       further names or addresses that clients use, comma-separated
set -euo pipefail

: "${GRADMIX_MLFLOW_STORE:?name the database: export GRADMIX_MLFLOW_STORE=postgresql://mlflow:PASSWORD@localhost/mlflow}"
folder=${GRADMIX_MLFLOW_FOLDER:-mlflow-server}
host=${GRADMIX_MLFLOW_HOST:-127.0.0.1}
port=${GRADMIX_MLFLOW_PORT:-5000}
mkdir -p "$folder"
chmod 700 "$folder"
folder=$(cd "$folder" && pwd)

# Users and permissions are kept in the same database, in tables of their own.
umask 077
cat >"$folder/auth.ini" <<END
[mlflow]
default_permission = READ
database_uri = $(printf '%s' "$GRADMIX_MLFLOW_STORE" | sed 's/%/%%/g')
admin_username = ${MLFLOW_AUTH_ADMIN_USERNAME:-admin}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
END
[ -s "$folder/secret" ] || python -c 'import secrets; print(secrets.token_hex(32))' >"$folder/secret"
MLFLOW_AUTH_CONFIG_PATH=$folder/auth.ini
MLFLOW_FLASK_SERVER_SECRET_KEY=$(cat "$folder/secret")
# Seven more processes for features that are not used here.
MLFLOW_SERVER_ENABLE_JOB_EXECUTION=${MLFLOW_SERVER_ENABLE_JOB_EXECUTION:-false}
# Not on the command line, where every user of the machine could read the password.
MLFLOW_BACKEND_STORE_URI=$GRADMIX_MLFLOW_STORE
export MLFLOW_AUTH_CONFIG_PATH MLFLOW_FLASK_SERVER_SECRET_KEY MLFLOW_SERVER_ENABLE_JOB_EXECUTION MLFLOW_BACKEND_STORE_URI

names="localhost:$port,127.0.0.1:$port,$host:$port"
for name in ${GRADMIX_MLFLOW_NAMES:+${GRADMIX_MLFLOW_NAMES//,/ }}; do
    names="$names,$name,$name:$port"
done
exec mlflow server --app-name basic-auth --host "$host" --port "$port" --allowed-hosts "$names" \
    --artifacts-destination "${GRADMIX_MLFLOW_ARTIFACTS:-$folder/artifacts}" --workers "${GRADMIX_MLFLOW_WORKERS:-2}"
