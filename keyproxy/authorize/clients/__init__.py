"""The identity of clients: their ids judged, their metadata documents fetched, their authentication verified."""
