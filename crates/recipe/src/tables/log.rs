//! `[log]`: what a run says while it trains.

use crate::EventFolder;
use crate::kind::{Address, Events, Integer, ShellCommand};

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
        /// writes TensorBoard's event files: `true` into `tensorboard` in the run directory, a path
        /// into a folder there that is named like the run
        tensorboard: Option<EventFolder> = Events, unset("off"), Local, [
            "use_tensorboard", "tensorboard_dir", "tensorboard_log_dir", "log.tb", "log.events",
        ];
        /// runs this command with `sh -c` after the run has ended, well or not; it gets
        /// `FINETUNE_RUN`, `FINETUNE_STATUS` (`done`, `stopped`, `failed`), `FINETUNE_EXIT_CODE`,
        /// `FINETUNE_STEP` and `FINETUNE_LOSS`, and 60 s
        on_end: Option<String> = ShellCommand, unset("none"), Local, [
            "log.notify", "log.command", "log.on_finish", "notification_command", "webhook_url" => "a command, such as curl, calls it",
        ];
    }
}
