//! The number formats of tensors.

use std::fmt;

/// The number formats of safetensors that fill whole bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(non_camel_case_types, reason = "the names in the files")]
pub enum Dtype {
    /// True or false, 1 byte.
    BOOL,
    /// Unsigned, 8 bits.
    U8,
    /// Signed, 8 bits.
    I8,
    /// Float of 8 bits: 5 of exponent, 2 of mantissa.
    F8_E5M2,
    /// Float of 8 bits: 4 of exponent, 3 of mantissa.
    F8_E4M3,
    /// Power of two, 8 bits of exponent.
    F8_E8M0,
    /// As `F8_E4M3`, without infinities and negative zero.
    F8_E4M3FNUZ,
    /// As `F8_E5M2`, without infinities and negative zero.
    F8_E5M2FNUZ,
    /// Signed, 16 bits.
    I16,
    /// Unsigned, 16 bits.
    U16,
    /// Float of 16 bits (IEEE half).
    F16,
    /// Float of 16 bits with the exponent of `F32`.
    BF16,
    /// Signed, 32 bits.
    I32,
    /// Unsigned, 32 bits.
    U32,
    /// Float of 32 bits.
    F32,
    /// Complex number of two `F32`.
    C64,
    /// Float of 64 bits.
    F64,
    /// Signed, 64 bits.
    I64,
    /// Unsigned, 64 bits.
    U64,
}

const DTYPES: [(Dtype, &str, usize); 19] = [
    (Dtype::BOOL, "BOOL", 1),
    (Dtype::U8, "U8", 1),
    (Dtype::I8, "I8", 1),
    (Dtype::F8_E5M2, "F8_E5M2", 1),
    (Dtype::F8_E4M3, "F8_E4M3", 1),
    (Dtype::F8_E8M0, "F8_E8M0", 1),
    (Dtype::F8_E4M3FNUZ, "F8_E4M3FNUZ", 1),
    (Dtype::F8_E5M2FNUZ, "F8_E5M2FNUZ", 1),
    (Dtype::I16, "I16", 2),
    (Dtype::U16, "U16", 2),
    (Dtype::F16, "F16", 2),
    (Dtype::BF16, "BF16", 2),
    (Dtype::I32, "I32", 4),
    (Dtype::U32, "U32", 4),
    (Dtype::F32, "F32", 4),
    (Dtype::C64, "C64", 8),
    (Dtype::F64, "F64", 8),
    (Dtype::I64, "I64", 8),
    (Dtype::U64, "U64", 8),
];

impl Dtype {
    /// The format of this name in the file. `None`: it is not known.
    pub fn parse(name: &str) -> Option<Self> {
        DTYPES.iter().find(|(_, known, _)| *known == name).map(|(dtype, _, _)| *dtype)
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        DTYPES[self as usize].2
    }

    /// The name in the file, such as `BF16`.
    pub fn name(self) -> &'static str {
        DTYPES[self as usize].1
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_dtypes_is_in_the_order_of_the_enum() {
        for (position, (dtype, name, _)) in DTYPES.iter().enumerate() {
            assert_eq!(*dtype as usize, position, "{name}");
            assert_eq!(Dtype::parse(dtype.name()), Some(*dtype));
            assert_eq!(format!("{dtype:?}"), *name);
        }
    }
}
