#!/bin/sh
# Restore what backup.sh wrote into empty databases and an empty folder, while both servers are stopped.
#
#   restore.sh BACKUP [ARTIFACTS]
#
# PGHOST, PGUSER and PGPASSWORD name the server and its administrator; databases.sql creates users and databases.
# Everything is checked before anything is written.
set -eu
backup=${1:?a folder that backup.sh printed}
artifacts=${2:-}
databases="prefect mlflow mlflow_accounts"
stop() {
  echo "$1" >&2
  exit 2
}
query() {
  psql --no-psqlrc --tuples-only --no-align --dbname="$1" --command="$2"
}
(cd "$backup" && sha256sum --check --quiet SHA256SUMS) || stop "$backup is not complete; use another backup"
for database in $databases; do
  [ -f "$backup/$database.dump" ] || stop "$backup has no $database.dump; use another backup"
  tables=$(query "$database" "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
  [ "$tables" = 0 ] || stop "the database $database has $tables tables; restore into an empty one"
done
if [ -f "$backup/artifacts.tar" ]; then
  [ -n "$artifacts" ] || stop "$backup contains MLflow's files; name an empty folder for them"
  mkdir -p "$artifacts"
  [ -z "$(ls -A "$artifacts")" ] || stop "$artifacts is not empty; restore into an empty folder"
  tar --extract --file="$backup/artifacts.tar" --directory="$artifacts"
fi
for database in $databases; do
  owner=$(query "$database" "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()")
  pg_restore --exit-on-error --single-transaction --no-owner --role="$owner" --dbname="$database" "$backup/$database.dump"
done
