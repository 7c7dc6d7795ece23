# One node of a rollcall cluster. Every key stands here with what it is by default, or with an example where it has no
# default ("example:"). `rollcall server -config node.hcl` reads it; node.json says the same in JSON. Every key is an
# environment variable too: ROLLCALL_ and the path in capitals (cluster.listen is ROLLCALL_CLUSTER_LISTEN), and that
# beats the file. What each key means, and what goes wrong, stands in node/config.go.

name         = "node-1"                    # example: the host's name
cluster_name = "rollcall"
data_dir     = "/var/lib/rollcall"         # example
plugin_dir   = "/usr/lib/rollcall/plugins" # example
socket_dir   = "/run/rollcall"             # example: "sockets" in data_dir

# The same three lines on every node, the first time and every later time.
bootstrap_expect     = 3                                                   # example
bootstrap_token_file = "/etc/rollcall/token"                               # example
retry_join           = ["10.0.0.1:8202", "10.0.0.2:8202", "10.0.0.3:8202"] # example

join {
  interval     = "1s"
  max_interval = "15s"
}

# Between nodes: Raft and gRPC, TLS 1.3 both ways.
cluster {
  listen    = "0.0.0.0:8201"                   # example: 127.0.0.1:8201
  advertise = "10.0.0.1:8201"                  # example
  ca_file   = "/etc/rollcall/tls/ca.pem"       # example: rollcall tls ca
  cert_file = "/etc/rollcall/tls/node.pem"     # example: rollcall tls cert
  key_file  = "/etc/rollcall/tls/node-key.pem" # example
}

gossip {
  listen    = "0.0.0.0:8202"             # example: 127.0.0.1:8202
  advertise = "10.0.0.1:8202"            # example
  key_file  = "/etc/rollcall/gossip.key" # example
}

# The API.
http {
  listen        = "0.0.0.0:8200"                   # example: 127.0.0.1:8200
  advertise     = "https://node-1.example:8200"    # example
  tls_cert_file = "/etc/rollcall/tls/http.pem"     # example
  tls_key_file  = "/etc/rollcall/tls/http-key.pem" # example
  allow_plain   = false
  max_body      = "32MiB"
  read_timeout  = "1m"
  idle_timeout  = "2m"
}

# What this node writes to its disk is sealed with data keys that this key locks. Without the block: nothing is.
seal {
  key_file          = "/etc/rollcall/seal.key" # example: rollcall tls seal-key
  command           = []                       # example, in place of key_file: ["/usr/local/bin/seal-key", "rollcall"]
  previous_key_file = ""                       # the key before it, when it is replaced, for one start
  previous_command  = []                       # example
  env_allow         = []                       # example: ["KMS_ENDPOINT"]
}

raft {
  performance_multiplier = 1
  snapshot_threshold     = 8192
  snapshot_interval      = "2m"
  trailing_logs          = 10240
  voters                 = 5
}

lease {
  ttl = "5s"
}

autopilot {
  dead_server_cleanup   = false
  dead_server_threshold = "24h"
  stabilization         = "10s"
}

plugins {
  start_timeout = "10s"
  memory_limit  = "256MiB"                  # example: none
  uid           = 1200                      # example: as the node
  gid           = 1200                      # example: as the node
  env_allow     = ["HTTPS_PROXY"]           # example: none
  cgroup        = "/sys/fs/cgroup/rollcall" # example: none
}

reload {
  history           = 100
  history_age       = "168h"
  queue             = 64
  queue_deadline    = "10m"
  prepare_deadline  = "2m"
  run_deadline      = "10m"
  start_parallelism = 8
}

audit {
  file          = "/var/log/rollcall/audit.log" # example: none
  hmac_accessor = true
  headers       = ["user-agent", "x-correlation-id"]
}

log {
  level  = "info"
  format = "text"
}

telemetry {
  prometheus = true
}
