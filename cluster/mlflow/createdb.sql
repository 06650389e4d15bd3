-- The database of cluster/mlflow/serve.sh: sudo -u postgres psql -v password=PASSWORD -f cluster/mlflow/createdb.sql
CREATE ROLE mlflow LOGIN PASSWORD :'password';
CREATE DATABASE mlflow OWNER mlflow;
