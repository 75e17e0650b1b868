//! One value to one Rust type, or the problem with it.

use toml::de::DeValue;

use crate::hint;
use crate::keys::Bounds;
use crate::problem::{Place, Problem};

pub(super) fn wrong_type(expected: &str, found: &DeValue<'_>, place: &Place) -> Problem {
    let problem = Problem::new(place.clone(), format!("expected {expected}, found {}", hint::type_of(found)));
    match found {
        // YAML habits: 2e-4 in quotes, "true".
        DeValue::String(text) if unquoted_helps(expected, text) => {
            problem.hint(format!("write it without quotes: {}", text.trim()))
        }
        DeValue::Integer(_) | DeValue::Float(_) if expected.contains("duration") => {
            problem.hint("write it with a unit and in quotes, such as \"5s\"")
        }
        DeValue::Integer(_) | DeValue::Float(_) if expected.contains("string") || expected.contains("path") => {
            problem.hint("write it in quotes")
        }
        _ => problem,
    }
}

fn unquoted_helps(expected: &str, text: &str) -> bool {
    let text = text.trim();
    let number = text.starts_with(|letter: char| letter.is_ascii_digit() || letter == '-');
    match expected {
        "an integer" => text.parse::<i64>().is_ok(),
        "a number" => number && text.parse::<f64>().is_ok_and(f64::is_finite),
        "true or false" => matches!(text, "true" | "false"),
        _ => false,
    }
}

/// A string that is not empty.
pub(super) fn text<'v>(path: &str, value: &'v DeValue<'_>, place: &Place) -> Result<&'v str, Problem> {
    match value {
        DeValue::String(text) if text.trim().is_empty() => {
            Err(Problem::new(place.clone(), format!("`{path}` must not be empty")))
        }
        DeValue::String(text) => Ok(text),
        other => Err(wrong_type("a string", other, place)),
    }
}

pub(super) fn path_text<'v>(path: &str, value: &'v DeValue<'_>, place: &Place) -> Result<&'v str, Problem> {
    let text = text(path, value, place)?;
    if text == "~" || text.starts_with("~/") {
        let message = format!("`{path}` starts with `~`, which only a shell replaces by the home directory");
        return Err(Problem::new(place.clone(), message).hint("write the whole path, or one relative to the recipe"));
    }
    if text.contains('\0') {
        return Err(Problem::new(place.clone(), format!("`{path}` has a zero byte, which no path may have")));
    }
    Ok(text)
}

/// `min` is 0 or more.
pub(super) fn integer(path: &str, value: &DeValue<'_>, place: &Place, min: i64) -> Result<u64, Problem> {
    let DeValue::Integer(written) = value else {
        let problem = wrong_type("an integer", value, place);
        return Err(if path == "train.epochs" && matches!(value, DeValue::Float(_)) {
            problem.hint("for a part of an epoch use `max_steps`")
        } else {
            problem
        });
    };
    let too_large = || Problem::new(place.clone(), format!("`{path}` must be at most {}, found {written}", i64::MAX));
    let negative = written.as_str().starts_with('-');
    match i64::from_str_radix(written.as_str(), written.radix()) {
        Err(_) if !negative => Err(too_large()),
        Ok(number) if number >= min => u64::try_from(number).map_err(|_| too_large()),
        _ => Err(Problem::new(place.clone(), format!("`{path}` must be at least {min}, found {written}"))),
    }
}

/// Integers are numbers too.
pub(super) fn number(path: &str, value: &DeValue<'_>, place: &Place, bounds: Bounds) -> Result<f64, Problem> {
    let (number, written) = match value {
        DeValue::Float(float) => (float.as_str().parse::<f64>().ok(), float.to_string()),
        DeValue::Integer(integer) => {
            // No limit is lost by i128: what exceeds it is refused like any number out of range.
            let number = i128::from_str_radix(integer.as_str(), integer.radix()).ok();
            (number.map(|number| number as f64), integer.to_string())
        }
        other => return Err(wrong_type("a number", other, place)),
    };
    let number = number.unwrap_or(f64::NAN);
    let (inside, rule) = match bounds {
        Bounds::Positive => (number > 0.0, "above 0"),
        Bounds::NotNegative => (number >= 0.0, "0 or more"),
        Bounds::Share => ((0.0..=1.0).contains(&number), "from 0 to 1"),
        Bounds::BelowOne => ((0.0..1.0).contains(&number), "0 or more and below 1"),
    };
    if number.is_finite() && inside {
        return Ok(number);
    }
    let finite = if number.is_finite() { "" } else { " and finite" };
    Err(Problem::new(place.clone(), format!("`{path}` must be {rule}{finite}, found {}", hint::shown(&written))))
}

/// Strings that are not empty.
pub(super) fn names(path: &str, value: &DeValue<'_>, place: &Place) -> Result<Vec<String>, Problem> {
    let DeValue::Array(items) = value else {
        return Err(wrong_type("a list of names", value, place));
    };
    let name =
        |item: &toml::Spanned<DeValue<'_>>| text(path, item.get_ref(), &place.part(item.span())).map(str::to_owned);
    items.iter().map(name).collect()
}
