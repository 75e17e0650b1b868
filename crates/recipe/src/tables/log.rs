//! `[log]`: what a run says while it trains.

use crate::kind::{Address, Integer};

table! {
    [log]
    /// What a run says while it trains.
    pub struct Log {
        /// optimizer steps between printed progress lines; `metrics.jsonl` has every step
        every: u64 = Integer(1), default(1), Local, [
            "logging_steps", "log_every_n_steps", "log_every", "steps_per_report", "log_interval",
            "logging_strategy" => "ours counts optimizer steps", "log.steps", "log.interval",
        ];
        /// serves metrics to Prometheus at this host and port, such as `127.0.0.1:9400`
        prometheus: Option<String> = Address, unset("off"), Local, [
            "use_prometheus" => r#"an address such as "127.0.0.1:9400""#,
            "prometheus_port" => r#"an address such as "127.0.0.1:9400""#,
            "metrics_port" => r#"an address such as "127.0.0.1:9400""#, "log.address",
        ];
    }
}
