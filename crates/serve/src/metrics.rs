//! Numbers of the server, in the text format of Prometheus.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use finetune_model::{EngineCounts, EngineSettings};

/// Upper bounds of the classes of times to the first token, in seconds.
const BOUNDS: [f64; 8] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0];

/// Counters since the start.
#[derive(Default)]
pub(crate) struct Metrics {
    /// Answers by the first digit of their status.
    responses: [AtomicU64; 6],
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
    answer_tokens: AtomicU64,
    /// Times to the first token by class. The last class has no bound.
    first_tokens: [AtomicU64; BOUNDS.len() + 1],
    first_token_microseconds: AtomicU64,
}

impl Metrics {
    pub(crate) fn response(&self, status: u16) {
        if let Some(count) = self.responses.get(usize::from(status / 100)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn prompt(&self, tokens: usize) {
        self.prompt_tokens.fetch_add(tokens as u64, Ordering::Relaxed);
    }

    pub(crate) fn cached(&self, tokens: usize) {
        self.cached_tokens.fetch_add(tokens as u64, Ordering::Relaxed);
    }

    pub(crate) fn token(&self) {
        self.answer_tokens.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn first_token(&self, time: Duration) {
        let class = BOUNDS.iter().position(|bound| time.as_secs_f64() <= *bound).unwrap_or(BOUNDS.len());
        self.first_tokens[class].fetch_add(1, Ordering::Relaxed);
        self.first_token_microseconds.fetch_add(time.as_micros() as u64, Ordering::Relaxed);
    }

    /// `bounds`: those of the engine, once there is one.
    pub(crate) fn text(&self, counts: EngineCounts, bounds: Option<EngineSettings>) -> String {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut text = String::new();
        let mut metric = |name: &str, kind: &str, help: &str, lines: &[(String, String)]| {
            // Writing to a string does not fail.
            let _ = writeln!(text, "# HELP finetune_{name} {help}\n# TYPE finetune_{name} {kind}");
            for (labels, value) in lines {
                let _ = writeln!(text, "finetune_{name}{labels} {value}");
            }
        };
        let plain = |value: u64| [(String::new(), value.to_string())];
        let statuses = self.responses.iter().enumerate().skip(1);
        let responses: Vec<_> =
            statuses.map(|(digit, count)| (format!("{{status=\"{digit}xx\"}}"), of(count).to_string())).collect();
        metric("responses_total", "counter", "Answers by status.", &responses);
        metric("prompt_tokens_total", "counter", "Tokens of prompts.", &plain(of(&self.prompt_tokens)));
        let cached = plain(of(&self.cached_tokens));
        metric("cached_prompt_tokens_total", "counter", "Tokens of prompts that were known from before.", &cached);
        metric("answer_tokens_total", "counter", "Tokens of answers.", &plain(of(&self.answer_tokens)));
        let EngineCounts { waiting, running, cache_bytes, prefix_bytes, speculated, passes, most_passes } = counts;
        metric("requests_waiting", "gauge", "Requests that wait.", &plain(waiting as u64));
        metric("requests_running", "gauge", "Requests that are answered.", &plain(running as u64));
        let help = "Most passes under way at once, where several ranks hold layers.";
        metric("passes_at_once_max", "gauge", help, &plain(most_passes as u64));
        let help = "Bytes of keys and values of requests that are answered, at their longest.";
        metric("cache_bytes", "gauge", help, &plain(cache_bytes as u64));
        let bytes = plain(prefix_bytes as u64);
        metric("prefix_bytes", "gauge", "Bytes of keys and values of earlier prompts.", &bytes);
        if let Some(EngineSettings { slots, queue, cache_bytes, prefix_bytes, .. }) = bounds {
            for (name, help, most) in [
                ("slots", "Requests that may be answered at a time.", slots),
                ("queue_slots", "Requests that may wait beside them.", queue),
                ("cache_bytes_max", "What cache_bytes may be.", cache_bytes),
                ("prefix_bytes_max", "What prefix_bytes may be.", prefix_bytes),
            ] {
                metric(name, "gauge", help, &plain(most as u64));
            }
        }
        let proposed = plain(speculated.proposed);
        metric("proposed_tokens_total", "counter", "Tokens that were proposed ahead of an answer.", &proposed);
        let accepted = plain(speculated.accepted);
        metric("accepted_tokens_total", "counter", "Proposed tokens that the model chose.", &accepted);
        let kinds = |prompts: u64, answers: u64| {
            let line = |kind: &str, count: u64| (format!("{{kind=\"{kind}\"}}"), count.to_string());
            [line("prompt", prompts), line("answer", answers)]
        };
        let each = kinds(passes.prompt_passes, passes.answer_passes);
        metric("passes_total", "counter", "Passes over the model, of prompts and of next tokens.", &each);
        let rows = kinds(passes.prompt_parts, passes.answer_rows);
        metric("pass_rows_total", "counter", "Parts of prompts and answers in those passes.", &rows);
        let mixed = plain(passes.mixed_passes);
        metric("mixed_passes_total", "counter", "Passes that requests of different adapters shared.", &mixed);
        let mut sum = 0;
        let mut lines = Vec::new();
        for (n, count) in self.first_tokens.iter().enumerate() {
            sum += of(count);
            let bound = BOUNDS.get(n).map_or("+Inf".to_owned(), f64::to_string);
            lines.push((format!("_bucket{{le=\"{bound}\"}}"), sum.to_string()));
        }
        let seconds = of(&self.first_token_microseconds) as f64 / 1e6;
        lines.push(("_sum".to_owned(), seconds.to_string()));
        lines.push(("_count".to_owned(), sum.to_string()));
        metric("first_token_seconds", "histogram", "From the request to the first token.", &lines);
        text
    }
}

#[cfg(test)]
mod tests {
    use finetune_model::{PassCounts, Speculated};

    use super::*;

    #[test]
    fn the_text_that_prometheus_reads() {
        let metrics = Metrics::default();
        metrics.response(200);
        metrics.response(429);
        metrics.prompt(7);
        metrics.first_token(Duration::from_millis(300));
        metrics.first_token(Duration::from_secs(100));
        let counts = EngineCounts {
            waiting: 1,
            running: 2,
            cache_bytes: 12,
            prefix_bytes: 3,
            speculated: Speculated { proposed: 9, accepted: 4 },
            passes: PassCounts {
                prompt_passes: 5,
                prompt_parts: 6,
                answer_passes: 7,
                answer_rows: 20,
                mixed_passes: 3,
            },
            most_passes: 3,
        };
        assert!(!metrics.text(counts, None).contains("finetune_slots"), "there is no engine yet");
        let bounds = EngineSettings { slots: 4, queue: 64, cache_bytes: 100, prefix_bytes: 50, speculate: 0 };
        let text = metrics.text(counts, Some(bounds));
        for line in [
            "finetune_responses_total{status=\"2xx\"} 1",
            "finetune_responses_total{status=\"4xx\"} 1",
            "finetune_prompt_tokens_total 7",
            "finetune_requests_waiting 1",
            "finetune_slots 4",
            "finetune_queue_slots 64",
            "finetune_cache_bytes 12",
            "finetune_cache_bytes_max 100",
            "finetune_prefix_bytes 3",
            "finetune_prefix_bytes_max 50",
            "finetune_passes_total{kind=\"prompt\"} 5",
            "finetune_pass_rows_total{kind=\"answer\"} 20",
            "finetune_mixed_passes_total 3",
            "finetune_passes_at_once_max 3",
            "# TYPE finetune_first_token_seconds histogram",
            "finetune_first_token_seconds_bucket{le=\"0.25\"} 0",
            "finetune_first_token_seconds_bucket{le=\"0.5\"} 1",
            "finetune_first_token_seconds_bucket{le=\"+Inf\"} 2",
            "finetune_first_token_seconds_sum 100.3",
            "finetune_first_token_seconds_count 2",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} is not in:\n{text}");
        }
    }
}
