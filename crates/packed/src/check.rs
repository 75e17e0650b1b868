//! Whether the parts of a packed matrix fit each other, and every value is a number.

use rayon::prelude::*;

use crate::error::PackedError;
use crate::matrix::{Decoder, Groups, PackedMatrix, Zeros};
use crate::numbers::Numbers;

impl PackedMatrix {
    /// Checks sizes against the shape, scales and biases for numbers that are not finite, and codes
    /// for those that mean no number. A matrix that passes decodes without a panic and without NaN.
    ///
    /// # Errors
    /// [`PackedError::Malformed`], without name and file: [`PackedError::of`] adds them.
    pub fn check(&self) -> Result<(), PackedError> {
        let [rows, columns] = self.shape;
        if rows == 0 || columns == 0 {
            return Err(PackedError::malformed("it has no elements"));
        }
        self.check_codes()?;
        self.check_groups()?;
        let groups = self.groups.count(self.shape);
        check_numbers(["scale", "scales"], &self.scales, groups)?;
        match &self.decoder {
            Decoder::Affine { biases } => check_numbers(["bias", "biases"], biases, groups),
            Decoder::Shifted { zeros, factor } => {
                if let Zeros::Each(zeros) = zeros {
                    check_count("zero points", zeros.len(), groups)?;
                }
                if factor.is_finite() { Ok(()) } else { Err(PackedError::malformed(format!("its factor is {factor}"))) }
            }
            Decoder::Table { table } => self.check_table(table),
        }
    }

    fn check_codes(&self) -> Result<(), PackedError> {
        let [rows, columns] = self.shape;
        let (bits, row_bits, found) = (self.codes.bits(), self.codes.row_bits(), self.codes.bytes().len());
        let whole = rows.checked_mul(row_bits).filter(|_| columns.checked_mul(bits).is_some_and(|row| row <= row_bits));
        let Some(whole) = whole else {
            let what = format!("{rows} rows of {columns} codes of {bits} bits, {row_bits} bits apart");
            return Err(PackedError::malformed(what));
        };
        let needed = self.codes.bytes_needed(rows, columns);
        // Each row may be followed by unused bits, the last one too.
        if (needed..=whole.div_ceil(8)).contains(&found) {
            return Ok(());
        }
        let what = format!("its codes have {found} bytes, and {rows} × {columns} codes of {bits} bits take {needed}");
        Err(PackedError::malformed(what))
    }

    fn check_groups(&self) -> Result<(), PackedError> {
        let columns = self.shape[1];
        let is_empty = match &self.groups {
            Groups::Blocks { rows, columns } => *rows == 0 || *columns == 0,
            Groups::Flat { elements } => *elements == 0,
            Groups::OfColumns { group, count } => {
                if group.len() != columns {
                    let what = format!("{} columns have a group, and it has {columns} columns", group.len());
                    return Err(PackedError::malformed(what));
                }
                if let Some(column) = group.iter().position(|group| *group as usize >= *count) {
                    let what = format!("column {column} is in group {}, and there are {count}", group[column]);
                    return Err(PackedError::malformed(what));
                }
                false
            }
        };
        if is_empty { Err(PackedError::malformed("its groups have no elements")) } else { Ok(()) }
    }

    /// A table has a value for each code. A code whose value is no number must not be there.
    fn check_table(&self, table: &[f32]) -> Result<(), PackedError> {
        check_count("values of codes", table.len(), 1 << self.codes.bits())?;
        let bad: Vec<u8> = (0..=255).zip(table).filter(|(_, value)| !value.is_finite()).map(|(code, _)| code).collect();
        if bad.is_empty() {
            return Ok(());
        }
        let [rows, columns] = self.shape;
        let found = (0..rows).into_par_iter().with_min_len(16).find_map_first(|row| {
            let mut codes = vec![0; columns];
            self.codes.unpack(self.codes.bit(row, 0), &mut codes);
            bad.iter().filter_map(|bad| codes.iter().position(|code| code == bad)).min().map(|column| (row, column))
        });
        let Some((row, column)) = found else { return Ok(()) };
        let value = table[self.codes.code(row, column) as usize];
        Err(PackedError::malformed(format!("element {column} of row {row} is {value}")))
    }
}

fn check_count(what: &str, found: usize, expected: usize) -> Result<(), PackedError> {
    if found == expected {
        Ok(())
    } else {
        Err(PackedError::malformed(format!("it has {found} {what}, not {expected}")))
    }
}

/// As many numbers as groups, and all of them finite.
fn check_numbers([what, several]: [&str; 2], numbers: &Numbers, groups: usize) -> Result<(), PackedError> {
    check_count(several, numbers.len(), groups)?;
    if let Numbers::Product { scales, factors, per } = numbers {
        if *per == 0 {
            return Err(PackedError::malformed(format!("each {what} has no factors")));
        }
        check_count("scales of scales", scales.len(), factors.len().div_ceil(*per))?;
    }
    match (0..groups).find(|n| !numbers.get(*n).is_finite()) {
        Some(n) => Err(PackedError::malformed(format!("{what} {n} is {}", numbers.get(n)))),
        None => Ok(()),
    }
}
