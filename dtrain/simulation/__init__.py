"""`dtrain simulate`: sweeps of the clock (`dtrain.comm.clock`) over networks, replicas, periods, failures."""
