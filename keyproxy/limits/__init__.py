"""Pure arithmetic of limits: plans, leases, holds. Time is an argument; nothing here waits."""
