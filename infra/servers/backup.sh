#!/bin/sh
# Back up the databases of both servers, and MLflow's files if they are in a folder.
#
#   backup.sh FOLDER [ARTIFACTS]
#
# PGHOST, PGUSER and PGPASSWORD name the server and its administrator. It prints the new folder in FOLDER. Databases go
# first: files are written before the entry that refers to them, so that every entry of a backup has its files.
set -eu
umask 077
folder=${1:?the folder for backups}
artifacts=${2:-}
name=$(date -u +%Y%m%dT%H%M%SZ)
partial="$folder/.$name.partial"
if [ -e "$folder/$name" ]; then
  echo "$folder/$name exists; wait a second and start again" >&2
  exit 2
fi
mkdir -p "$folder"
mkdir "$partial"
trap 'rm -rf "$partial"' EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
for database in prefect mlflow mlflow_accounts; do
  pg_dump --format=custom --no-owner --file="$partial/$database.dump" "$database"
  pg_restore --list "$partial/$database.dump" >/dev/null
done
if [ -n "$artifacts" ]; then
  # status 1: a file was changed while it was read, such as that of a training in progress
  tar --create --file="$partial/artifacts.tar" --directory="$artifacts" . || [ $? -eq 1 ]
fi
(cd "$partial" && sha256sum -- * >SHA256SUMS)
sync
mv "$partial" "$folder/$name"
echo "$folder/$name"
