"""`pastina serve`: a folder of adapters as a service.

Three processes. The one that speaks HTTP (`app`, `link`) imports no torch. The one that answers
(`process`, with `worker` and `registry` in it) knows no HTTP. They exchange `frames` over a socket.
A third, small one (`lookout`) tells the second what changed in the folder.
"""
