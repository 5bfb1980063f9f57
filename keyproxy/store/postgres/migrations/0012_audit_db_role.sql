-- Every audit row records the role that was logged in. keyproxy.actor is a setting that any client with write rights can
-- choose; session_user is not, and neither SECURITY DEFINER nor SET ROLE changes it.
--
-- A default rather than a value in each trigger: no insert can forget it. Null: written before this.
ALTER TABLE keyproxy.audit_log ADD COLUMN db_role text;
ALTER TABLE keyproxy.audit_log ALTER COLUMN db_role SET DEFAULT session_user;
COMMENT ON COLUMN keyproxy.audit_log.db_role IS 'session_user of the change; null: written before this column was there';
