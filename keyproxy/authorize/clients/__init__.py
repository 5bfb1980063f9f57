"""Who a client is: its id judged, its metadata document fetched, its authentication verified."""
