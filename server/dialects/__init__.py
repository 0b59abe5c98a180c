"""Wire formats: one file each, all on the same internal request and stream (`server.exchange`)."""
