//! Integers and numbers.

use toml::de::DeValue;

use super::{Kind, Written};
use crate::canonical::{float, list, quoted};
use crate::choices::StagesChoice;
use crate::hint;
use crate::problem::Problem;

/// An integer of at least this, 0 or more. At most 2^63 - 1, as TOML has it.
pub(crate) struct Integer(pub(crate) i64);

impl Kind for Integer {
    type Value = u64;

    fn read(&self, written: &Written<'_, '_>) -> Result<u64, Problem> {
        let DeValue::Integer(number) = written.value else {
            return Err(written.wrong_type("an integer"));
        };
        let (key, min) = (written.key, self.0);
        let too_large = || written.problem(format!("`{key}` must be at most {}, found {number}", i64::MAX));
        let negative = number.as_str().starts_with('-');
        match i64::from_str_radix(number.as_str(), number.radix()) {
            Err(_) if !negative => Err(too_large()),
            Ok(number) if number >= min => u64::try_from(number).map_err(|_| too_large()),
            _ => Err(written.problem(format!("`{key}` must be at least {min}, found {number}"))),
        }
    }

    fn write(&self, value: &u64) -> String {
        value.to_string()
    }

    fn words(&self) -> String {
        format!("integer, {} or more", self.0)
    }

    fn schema(&self) -> String {
        format!(r#""type": "integer", "minimum": {}"#, self.0)
    }
}

/// As [`Integer`], for numbers of things in memory.
pub(crate) struct Count(pub(crate) i64);

impl Kind for Count {
    type Value = usize;

    fn read(&self, written: &Written<'_, '_>) -> Result<usize, Problem> {
        // Pointers have 64 bits on every machine that trains.
        Ok(usize::try_from(Integer(self.0).read(written)?).unwrap_or(usize::MAX))
    }

    fn write(&self, value: &usize) -> String {
        value.to_string()
    }

    fn words(&self) -> String {
        Integer(self.0).words()
    }

    fn schema(&self) -> String {
        Integer(self.0).schema()
    }
}

/// A number of things, 1 or more, or `"auto"`.
pub(crate) struct CountOrAuto;

impl Kind for CountOrAuto {
    type Value = StagesChoice;

    fn read(&self, written: &Written<'_, '_>) -> Result<StagesChoice, Problem> {
        match written.value {
            DeValue::Integer(_) => Ok(StagesChoice::Count(Count(1).read(written)?)),
            DeValue::String(text) if text == "auto" => Ok(StagesChoice::Auto),
            _ => Err(written.wrong_type("an integer or \"auto\"")),
        }
    }

    fn write(&self, value: &StagesChoice) -> String {
        match value {
            StagesChoice::Auto => quoted("auto"),
            StagesChoice::Count(count) => count.to_string(),
        }
    }

    fn words(&self) -> String {
        "integer, 1 or more, or `\"auto\"`".to_owned()
    }

    fn schema(&self) -> String {
        format!(r#""anyOf": [{{ {} }}, {{ "const": "auto" }}]"#, Count(1).schema())
    }
}

/// A list of numbers of things, each 1 or more.
pub(crate) struct Counts;

impl Kind for Counts {
    type Value = Vec<usize>;

    fn read(&self, written: &Written<'_, '_>) -> Result<Vec<usize>, Problem> {
        match written.value {
            DeValue::Array(items) if items.is_empty() => {
                Err(written.problem(format!("`{}` must have a number", written.key)))
            }
            DeValue::Array(items) => written.items(items, |item| Count(1).read(item)),
            _ => Err(written.wrong_type("a list of integers")),
        }
    }

    fn write(&self, value: &Vec<usize>) -> String {
        list(value, usize::to_string)
    }

    fn words(&self) -> String {
        "list of integers, each 1 or more".to_owned()
    }

    fn schema(&self) -> String {
        format!(r#""type": "array", "items": {{ {} }}, "minItems": 1"#, Count(1).schema())
    }
}

/// Whole passes over the rows, 1 or more.
pub(crate) struct Epochs;

impl Kind for Epochs {
    type Value = u64;

    fn read(&self, written: &Written<'_, '_>) -> Result<u64, Problem> {
        Integer(1).read(written).map_err(|problem| match written.value {
            DeValue::Float(_) => problem.hint("for a part of an epoch use `max_steps`"),
            _ => problem,
        })
    }

    fn write(&self, value: &u64) -> String {
        value.to_string()
    }

    fn words(&self) -> String {
        Integer(1).words()
    }

    fn schema(&self) -> String {
        Integer(1).schema()
    }
}

/// The range of a number. Every number is finite.
#[derive(Clone, Copy)]
pub(crate) enum Bounds {
    /// Above 0.
    Positive,
    /// 0 or more.
    NotNegative,
    /// 0 to 1.
    Share,
    /// 0 or more and below 1.
    BelowOne,
    /// Above 0 and below 1.
    Between,
}

impl Bounds {
    fn contain(self, number: f64) -> bool {
        number.is_finite()
            && match self {
                Bounds::Positive => number > 0.0,
                Bounds::NotNegative => number >= 0.0,
                Bounds::Share => (0.0..=1.0).contains(&number),
                Bounds::BelowOne => (0.0..1.0).contains(&number),
                Bounds::Between => number > 0.0 && number < 1.0,
            }
    }

    /// The range in messages.
    fn rule(self) -> &'static str {
        match self {
            Bounds::Share => "from 0 to 1",
            other => other.words(),
        }
    }

    /// The range in the documentation.
    fn words(self) -> &'static str {
        match self {
            Bounds::Positive => "above 0",
            Bounds::NotNegative => "0 or more",
            Bounds::Share => "0 to 1",
            Bounds::BelowOne => "0 or more and below 1",
            Bounds::Between => "above 0 and below 1",
        }
    }

    fn schema(self) -> &'static str {
        match self {
            Bounds::Positive => r#""exclusiveMinimum": 0"#,
            Bounds::NotNegative => r#""minimum": 0"#,
            Bounds::Share => r#""minimum": 0, "maximum": 1"#,
            Bounds::BelowOne => r#""minimum": 0, "exclusiveMaximum": 1"#,
            Bounds::Between => r#""exclusiveMinimum": 0, "exclusiveMaximum": 1"#,
        }
    }
}

/// A number in a range. Integers are numbers too.
pub(crate) struct Number(pub(crate) Bounds);

impl Kind for Number {
    type Value = f64;

    fn read(&self, written: &Written<'_, '_>) -> Result<f64, Problem> {
        let (number, text) = match written.value {
            DeValue::Float(float) => (float.as_str().parse::<f64>().ok(), float.to_string()),
            DeValue::Integer(integer) => {
                // An integer that exceeds an i128 is refused like any number out of range.
                let number = i128::from_str_radix(integer.as_str(), integer.radix()).ok();
                (number.map(|number| number as f64), integer.to_string())
            }
            _ => return Err(written.wrong_type("a number")),
        };
        let number = number.unwrap_or(f64::NAN);
        if self.0.contain(number) {
            return Ok(number);
        }
        let finite = if number.is_finite() { "" } else { " and finite" };
        let (key, rule) = (written.key, self.0.rule());
        Err(written.problem(format!("`{key}` must be {rule}{finite}, found {}", hint::shown(&text))))
    }

    fn write(&self, value: &f64) -> String {
        float(*value)
    }

    /// As declared: `2e-4` rather than 0.0002, and `32` for 32_f64.
    fn default_text(&self, declared: &str, _value: &f64) -> String {
        declared.trim_end_matches("_f64").to_owned()
    }

    fn words(&self) -> String {
        format!("number, {}", self.0.words())
    }

    fn schema(&self) -> String {
        format!(r#""type": "number", {}"#, self.0.schema())
    }
}

/// A list of two numbers in a range.
pub(crate) struct NumberPair(pub(crate) Bounds);

impl Kind for NumberPair {
    type Value = [f64; 2];

    fn read(&self, written: &Written<'_, '_>) -> Result<[f64; 2], Problem> {
        let DeValue::Array(items) = written.value else {
            return Err(written.wrong_type("a list of two numbers"));
        };
        if items.len() != 2 {
            return Err(written.problem(format!("`{}` must have two numbers, found {}", written.key, items.len())));
        }
        let number = |index: usize| written.part(&items[index], |item| Number(self.0).read(item));
        Ok([number(0)?, number(1)?])
    }

    fn write(&self, value: &[f64; 2]) -> String {
        list(value, |number| float(*number))
    }

    fn words(&self) -> String {
        format!("two numbers, each {}", self.0.words())
    }

    fn schema(&self) -> String {
        let number = Number(self.0).schema();
        format!(r#""type": "array", "items": {{ {number} }}, "minItems": 2, "maxItems": 2"#)
    }
}

/// A list of numbers in a range, at least one. One number alone is a list of one.
pub(crate) struct Numbers(pub(crate) Bounds);

impl Kind for Numbers {
    type Value = Vec<f64>;

    fn read(&self, written: &Written<'_, '_>) -> Result<Vec<f64>, Problem> {
        match written.value {
            DeValue::Array(items) if items.is_empty() => {
                Err(written.problem(format!("`{}` must have a number", written.key)))
            }
            DeValue::Array(items) => written.items(items, |item| Number(self.0).read(item)),
            DeValue::Integer(_) | DeValue::Float(_) => Ok(vec![Number(self.0).read(written)?]),
            _ => Err(written.wrong_type("a list of numbers")),
        }
    }

    fn write(&self, value: &Vec<f64>) -> String {
        list(value, |number| float(*number))
    }

    fn words(&self) -> String {
        format!("list of numbers, each {}", self.0.words())
    }

    fn schema(&self) -> String {
        let number = Number(self.0).schema();
        let numbers = format!(r#""type": "array", "items": {{ {number} }}, "minItems": 1"#);
        format!(r#""anyOf": [{{ {number} }}, {{ {numbers} }}]"#)
    }
}
