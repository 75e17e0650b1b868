//! Codes of 2 to 8 bits in a stream of bytes.

/// Which half of a byte holds the even one of two 4-bit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NibbleOrder {
    /// The low half: the stream is little-endian, as for every other number of bits.
    LowFirst,
    /// The high half, as in bitsandbytes.
    HighFirst,
}

/// The codes of a matrix, row after row.
///
/// Code `j` of a row takes bits `j · bits` to `(j + 1) · bits` behind the start of the row, least
/// significant bit first.
#[derive(Clone, Debug)]
pub struct Codes {
    bytes: Vec<u8>,
    /// 2, 3, 4, 5, 6 or 8.
    bits: usize,
    /// Bits from the start of one row to that of the next.
    row_bits: usize,
    order: NibbleOrder,
}

impl Codes {
    /// Codes of `bits` each, whose rows start `row_bits` apart.
    ///
    /// # Panics
    /// If there is no such number of bits, or if another than 4 has its high half first.
    pub fn new(bytes: Vec<u8>, bits: usize, row_bits: usize, order: NibbleOrder) -> Codes {
        assert!(matches!(bits, 2 | 3 | 4 | 5 | 6 | 8), "codes of {bits} bits");
        assert!(bits == 4 || order == NibbleOrder::LowFirst, "halves of a byte with {bits} bits");
        Codes { bytes, bits, row_bits, order }
    }

    /// Bits of a code.
    pub fn bits(&self) -> usize {
        self.bits
    }

    /// Bits from the start of one row to that of the next.
    pub fn row_bits(&self) -> usize {
        self.row_bits
    }

    /// Which half of a byte comes first.
    pub fn order(&self) -> NibbleOrder {
        self.order
    }

    /// The stream.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The stream, for whoever holds it from now on.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Bytes that `rows` rows of `columns` codes take.
    pub fn bytes_needed(&self, rows: usize, columns: usize) -> usize {
        if rows == 0 { 0 } else { ((rows - 1) * self.row_bits + columns * self.bits).div_ceil(8) }
    }

    /// The code at a place.
    pub fn code(&self, row: usize, column: usize) -> u32 {
        let start = row * self.row_bits + column * self.bits;
        let start = if self.order == NibbleOrder::HighFirst { start ^ 4 } else { start };
        let byte = |n: usize| u32::from(self.bytes.get(n).copied().unwrap_or(0));
        let pair = byte(start / 8) | byte(start / 8 + 1) << 8;
        pair >> (start % 8) & ((1 << self.bits) - 1)
    }
}
