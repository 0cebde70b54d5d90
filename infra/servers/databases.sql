-- One user per service, and its databases. Run once by the image of PostgreSQL, when its folder is empty.
\set ON_ERROR_STOP on
\getenv prefect_password POSTGRES_PREFECT_PASSWORD
\getenv mlflow_password POSTGRES_MLFLOW_PASSWORD
CREATE ROLE prefect LOGIN PASSWORD :'prefect_password';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
CREATE DATABASE prefect OWNER prefect;
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE mlflow_accounts OWNER mlflow;
REVOKE CONNECT, TEMPORARY ON DATABASE prefect, mlflow, mlflow_accounts FROM PUBLIC;
