//! `[distributed]`: several ranks.

use std::time::Duration;

use crate::kind::{BelowOne, Count, Integer, Number, Period, Ports, Positive, word};
use crate::{BackendChoice, SharesChoice, TopologyChoice, WireChoice};

table! {
    [distributed]
    /// How ranks work together.
    ///
    /// `ports` are the first and the last TCP port at which ranks listen.
    pub struct Distributed {
        /// how ranks talk; `auto`: RDMA over Thunderbolt where every rank has it, else TCP
        backend: BackendChoice = word::<BackendChoice>(), default(BackendChoice::Auto), Shared, [
            "ddp_backend", "transport", "comm_backend", "distributed_backend",
        ];
        /// who talks to whom
        topology: TopologyChoice = word::<TopologyChoice>(),
            default(TopologyChoice::Auto), Shared, [
            "network_topology", "distributed.network", "distributed.algorithm",
        ];
        /// a silent peer is lost after this: a number with `ms`, `s`, `m` or `h`, up to 1h
        timeout: Duration = Period, default(Duration::from_secs(5)), Shared, [
            "ddp_timeout" => r#"with a unit: "5s""#, "nccl_timeout" => r#"with a unit: "5s""#,
            "timeout_seconds" => r#"with a unit: "5s""#, "peer_timeout" => r#"with a unit: "5s""#,
        ];
        /// the arithmetic of this many ranks, bit for bit, on any number of processes that divides
        /// it
        virtual_ranks: Option<usize> = Count(1), unset("as many as there are processes"), Digest, [
            "logical_ranks", "virtual_workers",
            "distributed.ranks" => "how many processes run is for finetune launch -n; this is whose arithmetic they follow",
        ];
        /// a restart may go on with this many
        min_ranks: Option<usize> = Count(1), unset("as many as at the start"), Local, [
            "min_nodes", "min_workers", "min_world_size",
            "nnodes" => "how many run is for finetune launch -n; the least that may go on is `min_ranks`",
        ];
        /// how long ranks wait for each other at the start: a number with `ms`, `s`, `m` or `h`, up
        /// to 1h
        join_timeout: Option<Duration> = Period,
            unset("1m under `finetune launch`, 5m under other launchers"), Local, [
            "rendezvous_timeout" => r#"with a unit: "5m""#,
            "rdzv_timeout" => r#"with a unit: "5m""#, "init_timeout" => r#"with a unit: "5m""#,
            "start_timeout" => r#"with a unit: "5m""#,
        ];
        /// TCP ports at which ranks listen, where a firewall lets only some through:
        /// `"29500-29599"`; each takes the first free one
        ports: Option<(u16, u16)> = Ports, unset("any free ones"), Local, [
            "port_range", "distributed.port" => r#"a port or a range, such as "29500-29599""#,
            "main_process_port" => "the port of rank 0: finetune launch --port",
            "master_port" => "the port of rank 0: finetune launch --port",
        ];
        /// how the rows of a step are shared out: `even`; `measured`: by the ranks' speed, with
        /// `virtual_ranks`, without changing a bit
        shares: SharesChoice = word::<SharesChoice>(), default(SharesChoice::Even), Shared, [
            "load_balancing" => r#"write shares = "measured""#,
        ];
        /// steps that each rank makes alone, before what they have learned is averaged, for slow networks:
        /// another run than with every step together, and a worse one per token (`docs/slow-networks.md`);
        /// evaluations, checkpoints and a signal wait for the next average
        sync_every: Option<u64> = Integer(1), unset("every step is made together"), Digest, [
            "local_steps", "diloco_sync_every", "h", "inner_steps", "sync_interval", "local_sgd_steps",
        ];
        /// with `sync_every`: the part of the averaged change that is taken
        outer_learning_rate: Option<f64> = Number(Positive), unset("1.0"), Digest, ["outer_lr", "diloco_outer_lr"];
        /// with `sync_every`: Nesterov's momentum of the averaged change
        outer_momentum: Option<f64> = Number(BelowOne), unset("0: the plain average"), Digest, ["outer_momentum_beta"];
        /// what gradients are on the way between ranks; `bf16`: half of the bytes, each rank's rounded once
        /// and added in f32
        wire: Option<WireChoice> = word::<WireChoice>(), unset("`f32`: exact"), Digest, [
            "gradient_compression" => r#"write wire = "bf16""#, "comm_dtype", "ddp_comm_hook", "fp16_compression",
            "communication_data_type", "reduce_dtype",
        ];
    }
}
