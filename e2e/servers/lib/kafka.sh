# Apache Kafka (KRaft) from the jars of Maven Central: BROKERS nodes, each of
# them broker and controller. Sourced by servers.sh.

kafka_version=${KAFKA_VERSION:-$(sed -n 's:.*<kafka\.version>\(.*\)</kafka\.version>.*:\1:p' "$here/pom.xml")}
kafka_jars=${KAFKA_JARS:-$cache/kafka-$kafka_version}
kafka_heap=${KAFKA_HEAP:-256m}

kafka_fetch() {
  [[ -e $kafka_jars/complete ]] && return
  need mvn maven
  local part
  mkdir -p "$(dirname "$kafka_jars")"
  # Beside its final place, so that an interrupted download is never taken for a whole one.
  part=$(mktemp -d "$kafka_jars.part.XXXXXX")
  mvn --quiet --batch-mode --file "$here/pom.xml" -Dkafka.version="$kafka_version" \
    dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$part" >&2 ||
    { rm -rf "$part"; fail "the jars of Kafka $kafka_version could not be fetched"; }
  touch "$part/complete"
  rm -rf "$kafka_jars"
  mv "$part" "$kafka_jars"
}

# Prints the addresses of all brokers, with commas.
kafka_brokers() {
  local n list=
  for ((n = 1; n <= BROKERS; n++)); do list+=,127.0.0.1:$(port "kafka-$n"); done
  echo "${list#,}"
}

kafka_jaas() { # MODULE USER [OPTION...]
  echo "org.apache.kafka.common.security.$1 required username=\"$2\" password=\"$(cat "$(secret "kafka.$2")")\"${3:+ $3};"
}

kafka_configure() { # N
  local n=$1 node=$dir/kafka-$1 voters= i replicas=1 insync=1
  local client=PLAINTEXT controller=PLAINTEXT
  for ((i = 1; i <= BROKERS; i++)); do voters+=,$i@127.0.0.1:$(port "kafka-$i-controller"); done
  ((BROKERS < 3)) || { replicas=3 insync=2; }
  case $TLS$AUTH in
  01) client=SASL_PLAINTEXT controller=SASL_PLAINTEXT ;;
  10) client=SSL controller=SSL ;;
  11) client=SASL_SSL controller=SASL_SSL ;;
  esac
  (
    umask 077
    cat >"$node/server.properties" <<PROPERTIES
process.roles=broker,controller
node.id=$n
controller.quorum.voters=${voters#,}
controller.listener.names=CONTROLLER
listeners=CLIENT://127.0.0.1:$(port "kafka-$n"),CONTROLLER://127.0.0.1:$(port "kafka-$n-controller")
advertised.listeners=CLIENT://127.0.0.1:$(port "kafka-$n")
listener.security.protocol.map=CLIENT:$client,CONTROLLER:$controller
inter.broker.listener.name=CLIENT
log.dirs=$node/data
# Topics are created by those who know their partitions.
auto.create.topics.enable=false
default.replication.factor=$replicas
min.insync.replicas=$insync
offsets.topic.replication.factor=$replicas
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=$replicas
transaction.state.log.min.isr=$insync
transaction.state.log.num.partitions=1
share.coordinator.state.topic.replication.factor=$replicas
share.coordinator.state.topic.min.isr=$insync
share.coordinator.state.topic.num.partitions=1
# Tests do not wait: the first rebalance is at once, and a broker that comes
# back need not wait long for its former session to end.
group.initial.rebalance.delay.ms=0
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
# Small.
num.network.threads=2
num.io.threads=2
log.segment.bytes=67108864
log.cleaner.dedupe.buffer.size=4194304
PROPERTIES
    if ((TLS)); then
      cat "$dir/secrets/server.key" "$dir/secrets/server.crt" >"$node/keystore.pem"
      cat >>"$node/server.properties" <<PROPERTIES
ssl.keystore.type=PEM
ssl.keystore.location=$node/keystore.pem
ssl.truststore.type=PEM
ssl.truststore.location=$dir/secrets/ca.crt
PROPERTIES
    fi
    if ((AUTH)); then
      # Controllers do not take SCRAM, whose credentials they keep: among themselves it is PLAIN.
      cat >>"$node/server.properties" <<PROPERTIES
sasl.enabled.mechanisms=SCRAM-SHA-512
sasl.mechanism.inter.broker.protocol=SCRAM-SHA-512
sasl.mechanism.controller.protocol=PLAIN
listener.name.client.scram-sha-512.sasl.jaas.config=$(kafka_jaas scram.ScramLoginModule broker)
listener.name.controller.sasl.enabled.mechanisms=PLAIN
listener.name.controller.plain.sasl.jaas.config=$(kafka_jaas plain.PlainLoginModule broker "user_broker=\"$(cat "$(secret kafka.broker)")\"")
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
allow.everyone.if.no.acl.found=false
super.users=User:broker;User:admin;User:tidewaiter
PROPERTIES
    fi
  )
}

kafka_java() { # HEAP JVM-AND-CLASS-ARGUMENTS...
  local memory=$1
  shift
  java -Xmx"$memory" -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Djava.awt.headless=true -cp "$kafka_jars/*" "$@"
}

kafka_format() { # N
  local node=$dir/kafka-$1 user
  [[ -e $node/data/meta.properties ]] && return
  [[ -e $dir/kafka.cluster ]] || openssl rand -base64 16 | tr '+/' '-_' | tr -d '=\n' >"$dir/kafka.cluster"
  # In a file, since a command line can be read by everybody.
  (
    umask 077
    {
      echo "kafka.tools.StorageTool format --cluster-id=$(cat "$dir/kafka.cluster") --config $node/server.properties"
      if ((AUTH)); then
        for user in broker admin tidewaiter; do
          echo "--add-scram SCRAM-SHA-512=[name=$user,password=$(cat "$(secret "kafka.$user")")]"
        done
      fi
    } >"$node/format.args"
  )
  kafka_java 128m "@$node/format.args" >"$node/format.log" 2>&1 || { cat "$node/format.log" >&2; fail "$node could not be formatted"; }
  rm "$node/format.args"
}

kafka_start() { # N
  need java default-jre-headless
  kafka_fetch
  mkdir -p "$dir/kafka-$1"
  kafka_configure "$1"
  kafka_format "$1"
  launch "kafka-$1" java -Xmx"$kafka_heap" -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:MaxDirectMemorySize=128m \
    -XX:+ExitOnOutOfMemoryError -Djava.awt.headless=true -Dlog4j2.level=INFO \
    -cp "$kafka_jars/*" kafka.Kafka "$dir/kafka-$1/server.properties"
}

# It answers a request of version 0 of ApiVersions (which needs no login) with
# its correlation id, 7, and no error; and has said in this run that it started,
# which it does once the controllers let it serve.
kafka_check() { # N
  local ask='\0\0\0\012\0\022\0\0\0\0\0\07\377\377' answer port
  port=$(port "kafka-$1")
  said "kafka-$1" 'Kafka Server started' || return 1
  if ((TLS)); then
    answer=$({ printf "$ask"; sleep 0.5; } | timeout 5 openssl s_client -quiet -verify_return_error -CAfile "$dir/secrets/ca.crt" -connect "127.0.0.1:$port" 2>/dev/null | head -c 10 | od -An -tx1)
  else
    answer=$({ exec 3<>"/dev/tcp/127.0.0.1/$port" && printf "$ask" >&3 && timeout 5 head -c 10 <&3; } 2>/dev/null | od -An -tx1)
  fi
  [[ $answer == *" 00 00 00 07 00 00" ]]
}
