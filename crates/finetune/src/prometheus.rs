//! The numbers of a run for Prometheus (`[log] prometheus`), on rank 0.
//!
//! `curl http://127.0.0.1:9400/metrics` shows them all with a line about each.

use finetune_trainer::{Event, RankRow};
use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};
use metrics_exporter_prometheus::PrometheusBuilder;

use crate::failure::Failure;
use crate::http::{self, Answer};

/// Serves what [`show`] is told, from now to the end of the process.
pub(crate) fn serve(address: &str) -> Result<(), Failure> {
    let hint = "log.prometheus is host:port of this machine, such as \"127.0.0.1:9400\"; leave it out to serve nothing";
    let failed = |error: String| Failure::arguments(format!("log.prometheus = {address:?}: {error}"), hint);
    let listener = std::net::TcpListener::bind(address).map_err(|error| failed(error.to_string()))?;
    let recorder = PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).map_err(|error| failed(error.to_string()))?;
    describe();
    let answer = move |path: &str| match path.split('?').next() {
        Some("/" | "/metrics") => Answer { status: "200 OK", text: handle.render() },
        _ => Answer { status: "404 Not Found", text: "the numbers are at /metrics\n".to_owned() },
    };
    let thread = std::thread::Builder::new().name("prometheus".to_owned());
    thread.spawn(move || http::serve(&listener, &answer)).map_err(|_| Failure::no_threads())?;
    Ok(())
}

fn describe() {
    let gauges = [
        ("finetune_step", Unit::Count, "optimizer steps done"),
        ("finetune_steps", Unit::Count, "optimizer steps of the whole run"),
        ("finetune_epoch", Unit::Count, "passes over the training data"),
        ("finetune_loss", Unit::Count, "loss per trained token of the last step"),
        ("finetune_eval_loss", Unit::Count, "loss per trained token of the last evaluation"),
        ("finetune_grad_norm", Unit::Count, "norm of the last gradient, before clipping"),
        ("finetune_learning_rate", Unit::Count, "learning rate of the last step"),
        ("finetune_tokens_per_second", Unit::CountPerSecond, "tokens of the last step over its time"),
        ("finetune_step_seconds", Unit::Seconds, "time of the last step"),
        ("finetune_checkpoint_step", Unit::Count, "step of the newest checkpoint"),
        ("finetune_rank_step_seconds", Unit::Seconds, "time that a rank took for its rows of the last step"),
    ];
    gauges.into_iter().for_each(|(name, unit, about)| describe_gauge!(name, unit, about));
    let counters = [
        (
            "finetune_tokens_total",
            Unit::Count,
            "tokens trained on since the start of the process, padding and prompts included",
        ),
        ("finetune_trained_tokens_total", Unit::Count, "tokens that the loss counted since the start of the process"),
        ("finetune_rank_sent_bytes_total", Unit::Bytes, "payload that a rank has sent to others"),
        ("finetune_rank_received_bytes_total", Unit::Bytes, "payload that a rank has received from others"),
        ("finetune_rank_waited_milliseconds_total", Unit::Milliseconds, "time that a rank has waited for a peer"),
    ];
    counters.into_iter().for_each(|(name, unit, about)| describe_counter!(name, unit, about));
}

/// Takes over the numbers of an event. `host` names a rank's machine.
pub(crate) fn show(event: &Event<'_>, host: &dyn Fn(usize) -> String) {
    match event {
        Event::Step { row, steps } => {
            gauge!("finetune_step").set(row.step as f64);
            gauge!("finetune_steps").set(*steps as f64);
            gauge!("finetune_epoch").set(row.epoch);
            gauge!("finetune_loss").set(row.loss);
            gauge!("finetune_grad_norm").set(row.grad_norm);
            gauge!("finetune_learning_rate").set(row.learning_rate);
            gauge!("finetune_tokens_per_second").set(row.tokens_per_second);
            gauge!("finetune_step_seconds").set(row.seconds);
            counter!("finetune_tokens_total").increment(row.tokens);
            counter!("finetune_trained_tokens_total").increment(row.trained_tokens);
            row.ranks.iter().for_each(|row| show_rank(row, host));
        }
        Event::Evaluated { row, .. } => gauge!("finetune_eval_loss").set(row.eval_loss),
        Event::Saved { step, .. } => gauge!("finetune_checkpoint_step").set(*step as f64),
        _ => {}
    }
}

fn show_rank(row: &RankRow, host: &dyn Fn(usize) -> String) {
    let labels = [("rank", row.rank.to_string()), ("host", host(row.rank))];
    gauge!("finetune_rank_step_seconds", &labels).set(row.seconds);
    counter!("finetune_rank_sent_bytes_total", &labels).absolute(row.sent);
    counter!("finetune_rank_received_bytes_total", &labels).absolute(row.received);
    for (peer, seconds) in row.waited_for.iter().enumerate().filter(|(peer, _)| *peer != row.rank) {
        let labels = [("rank", row.rank.to_string()), ("peer", peer.to_string()), ("peer_host", host(peer))];
        counter!("finetune_rank_waited_milliseconds_total", &labels).absolute((seconds * 1e3) as u64);
    }
}
