"""Settings of tools, approvals, credentials of upstreams and anomalies."""
