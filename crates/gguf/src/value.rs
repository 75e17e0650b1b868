//! The values of the metadata.

use crate::error::GgufError;

/// Keys and values in the order of the file.
pub type Metadata = Vec<(String, Value)>;

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the names are the types")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    /// Values of one type, at least one of them. An array of arrays is not written.
    Array(Vec<Value>),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// The type of a value, by its number in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[expect(missing_docs, reason = "the names are the types")]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    const ALL: [ValueType; 13] = [
        ValueType::U8,
        ValueType::I8,
        ValueType::U16,
        ValueType::I16,
        ValueType::U32,
        ValueType::I32,
        ValueType::F32,
        ValueType::Bool,
        ValueType::String,
        ValueType::Array,
        ValueType::U64,
        ValueType::I64,
        ValueType::F64,
    ];

    /// The type of this number.
    pub(crate) fn of_code(code: u32) -> Option<ValueType> {
        Self::ALL.get(code as usize).copied()
    }

    /// Bytes that a value takes at least.
    pub(crate) fn least_bytes(self) -> u64 {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => 1,
            ValueType::U16 | ValueType::I16 => 2,
            ValueType::U32 | ValueType::I32 | ValueType::F32 => 4,
            ValueType::U64 | ValueType::I64 | ValueType::F64 | ValueType::String => 8,
            ValueType::Array => 12,
        }
    }
}

impl Value {
    /// Strings as an array.
    pub fn strings<S: Into<String>>(strings: impl IntoIterator<Item = S>) -> Value {
        Value::Array(strings.into_iter().map(|string| Value::String(string.into())).collect())
    }

    /// The type of the value.
    pub fn value_type(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::String(_) => ValueType::String,
            Value::Array(_) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }

    /// The text of a string.
    pub fn as_str(&self) -> Option<&str> {
        if let Value::String(text) = self { Some(text) } else { None }
    }

    /// A whole number that is not negative, of any type.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::U8(number) => Some(number.into()),
            Value::U16(number) => Some(number.into()),
            Value::U32(number) => Some(number.into()),
            Value::U64(number) => Some(number),
            Value::I8(number) => number.try_into().ok(),
            Value::I16(number) => number.try_into().ok(),
            Value::I32(number) => number.try_into().ok(),
            Value::I64(number) => number.try_into().ok(),
            _ => None,
        }
    }

    /// The values of an array.
    pub fn as_array(&self) -> Option<&[Value]> {
        if let Value::Array(values) = self { Some(values) } else { None }
    }

    /// Appends the bytes of the value, without its type.
    pub(crate) fn write(&self, bytes: &mut Vec<u8>) -> Result<(), GgufError> {
        match self {
            Value::U8(number) => bytes.push(*number),
            Value::I8(number) => bytes.extend(number.to_le_bytes()),
            Value::U16(number) => bytes.extend(number.to_le_bytes()),
            Value::I16(number) => bytes.extend(number.to_le_bytes()),
            Value::U32(number) => bytes.extend(number.to_le_bytes()),
            Value::I32(number) => bytes.extend(number.to_le_bytes()),
            Value::F32(number) => bytes.extend(number.to_le_bytes()),
            Value::Bool(value) => bytes.push(u8::from(*value)),
            Value::String(text) => write_text(text, bytes),
            Value::Array(values) => write_array(values, bytes)?,
            Value::U64(number) => bytes.extend(number.to_le_bytes()),
            Value::I64(number) => bytes.extend(number.to_le_bytes()),
            Value::F64(number) => bytes.extend(number.to_le_bytes()),
        }
        Ok(())
    }
}

/// The length of a text as u64, then its bytes.
pub(crate) fn write_text(text: &str, bytes: &mut Vec<u8>) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

fn write_array(values: &[Value], bytes: &mut Vec<u8>) -> Result<(), GgufError> {
    let impossible = |what: &str| Err(GgufError::Impossible { what: what.to_owned() });
    let Some(first) = values.first().map(Value::value_type) else {
        return impossible("an array without values, which has no type");
    };
    if first == ValueType::Array {
        return impossible("an array of arrays");
    }
    if values.iter().any(|value| value.value_type() != first) {
        return impossible("an array of several types");
    }
    bytes.extend((first as u32).to_le_bytes());
    bytes.extend((values.len() as u64).to_le_bytes());
    values.iter().try_for_each(|value| value.write(bytes))
}
