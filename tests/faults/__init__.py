"""Faults against the shard path: the tools, and the cases that use them.

policy.py    which request meets which fault, from a seed
proxy.py     the reverse proxy that carries it out (exchange.py: one request; wire.py: HTTP/1.1 as bytes)
killer.py    kills random processes of one Ray session at intervals, and reports them
training_killer.py  kills training workers or their driver at published steps
nodes.py     a Ray cluster of several nodes on this machine, to lose nodes from
servers.py   a SeaweedFS to kill, restart and hold still; a Ceph RADOS gateway
world.py     server, proxy, cluster and messy input together, as the cases need them
check.py     the bytes in the bucket against an undisturbed run; shares no code with the system
report.py    pytest plugin: what every case did and found (``--faults-report FILE``)
"""
