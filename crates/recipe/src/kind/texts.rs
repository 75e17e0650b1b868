//! Texts with a form of their own: addresses, dates, durations, ports.

use std::time::Duration;

use toml::de::DeValue;

use super::{Kind, Written};
use crate::canonical::quoted;
use crate::problem::Problem;
use crate::{date, duration, hint};

/// host:port
pub(crate) struct Address;

impl Kind for Address {
    type Value = String;

    fn read(&self, written: &Written<'_, '_>) -> Result<String, Problem> {
        let text = written.text()?;
        if is_address(text) {
            return Ok(text.to_owned());
        }
        let message = format!("`{}` must be a host and a port, found \"{}\"", written.key, hint::shown(text));
        Err(written.problem(message).hint("for example \"127.0.0.1:9400\""))
    }

    fn write(&self, value: &String) -> String {
        quoted(value)
    }

    fn words(&self) -> String {
        "host:port".to_owned()
    }

    fn schema(&self) -> String {
        r#""type": "string", "pattern": "^.+:[0-9]+$""#.to_owned()
    }
}

fn is_address(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
}

/// YYYY-MM-DD, with or without quotes.
pub(crate) struct Day;

impl Kind for Day {
    type Value = String;

    fn read(&self, written: &Written<'_, '_>) -> Result<String, Problem> {
        let text = match written.value {
            DeValue::Datetime(date) => date.to_string(),
            _ => written.text()?.to_owned(),
        };
        if date::is_date(&text) {
            return Ok(text);
        }
        let message = format!("`{}` must be a date, found \"{}\"", written.key, hint::shown(&text));
        Err(written.problem(message).hint("year, month and day: \"2026-11-27\""))
    }

    fn write(&self, value: &String) -> String {
        quoted(value)
    }

    fn words(&self) -> String {
        "date".to_owned()
    }

    fn schema(&self) -> String {
        r#""type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$""#.to_owned()
    }
}

/// A whole number with a unit, above 0 and at most 1h: "500ms", "5s".
pub(crate) struct Period;

impl Kind for Period {
    type Value = Duration;

    fn read(&self, written: &Written<'_, '_>) -> Result<Duration, Problem> {
        let DeValue::String(text) = written.value else {
            return Err(written.wrong_type("a duration such as \"5s\""));
        };
        let (key, shown) = (written.key, hint::shown(text));
        match duration::parse(text) {
            None => {
                let message = format!("`{key}` must be a duration, found \"{shown}\"");
                Err(written.problem(message).hint("a whole number and ms, s, m or h, such as \"5s\" or \"500ms\""))
            }
            Some(time) if time.is_zero() || time > duration::LONGEST => {
                Err(written.problem(format!("`{key}` must be above 0s and at most 1h, found \"{shown}\"")))
            }
            Some(time) => Ok(time),
        }
    }

    fn write(&self, value: &Duration) -> String {
        quoted(&duration::text(*value))
    }

    fn words(&self) -> String {
        "duration".to_owned()
    }

    fn schema(&self) -> String {
        r#""type": "string", "pattern": "^[0-9]+ *(ms|s|m|h) *$""#.to_owned()
    }
}

/// One TCP port, or the first and the last of a range: "29500", "29500-29599".
pub(crate) struct Ports;

impl Kind for Ports {
    type Value = (u16, u16);

    fn read(&self, written: &Written<'_, '_>) -> Result<(u16, u16), Problem> {
        let text = match written.value {
            DeValue::Integer(port) => port.to_string(),
            _ => written.text()?.to_owned(),
        };
        let (first, last) = text.split_once('-').unwrap_or((&text, &text));
        let port = |text: &str| text.trim().parse::<u16>().ok().filter(|&port| port > 0);
        match (port(first), port(last)) {
            (Some(first), Some(last)) if first <= last => Ok((first, last)),
            _ => {
                let shown = hint::shown(&text);
                let message = format!("`{}` must be a port or a range of ports, found \"{shown}\"", written.key);
                Err(written.problem(message).hint("for example \"29500-29599\""))
            }
        }
    }

    fn write(&self, value: &(u16, u16)) -> String {
        match value {
            (first, last) if first == last => quoted(&first.to_string()),
            (first, last) => quoted(&format!("{first}-{last}")),
        }
    }

    fn words(&self) -> String {
        "port, or range of ports".to_owned()
    }

    fn schema(&self) -> String {
        let number = r#""type": "integer", "minimum": 1, "maximum": 65535"#;
        let text = r#""type": "string", "pattern": "^ *[0-9]+ *(- *[0-9]+ *)?$""#;
        format!(r#""anyOf": [{{ {number} }}, {{ {text} }}]"#)
    }
}
