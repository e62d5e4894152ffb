"""`jlar.monitor` on logs and beside runs that train, and how often it is right."""
