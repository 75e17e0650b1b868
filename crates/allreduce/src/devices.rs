//! Which RDMA device of a rank leads to which other rank, as MLX's device file says it.
//!
//! ```json
//! [[null,                        "rdma_en5", ["rdma_en4", "rdma_en6"]],
//!  ["rdma_en5",                  null,       "rdma_en3"              ],
//!  [["rdma_en4", "rdma_en6"],    "rdma_en3", null                    ]]
//! ```
//! Row i holds the devices of rank i; column j the rank at the other end; several names are several
//! cables. (ml-explore/mlx, mlx/distributed/jaccl/lib/jaccl/jaccl.cpp, `parse_devices_json`.)

use finetune_advice::Advice;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

#[cfg(test)]
mod tests;

pub const MAX_DEVICE_FILE_BYTES: usize = 1 << 20;
/// A Mac has at most 6 Thunderbolt ports; 64 leaves room for switched RDMA.
const MAX_RANKS: usize = 64;
const MAX_NAMES_PER_CELL: usize = 16;
/// `IBV_SYSFS_NAME_MAX` of rdma-core.
const MAX_NAME_BYTES: usize = 64;

/// N×N lists of RDMA device names. Checked: square, an empty diagonal, names that are names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceMatrix {
    rows: Vec<Vec<Vec<String>>>,
}

/// What the cables allow. A matrix that is both is called a mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Every two ranks are wired, with as many cables one way as the other. A single rank is a
    /// mesh.
    Mesh,
    /// Every rank is wired to the next one, the last to the first, and all of these cells name
    /// equally many devices: what JACCL takes as a ring (`Config::is_valid_ring`).
    Ring,
    Neither,
}

/// What is wrong with one cell.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WiresError {
    #[error("{found} is not null, a device name or a list of device names")]
    Type { found: String },
    #[error("it has {count} device names, the limit is {MAX_NAMES_PER_CELL}")]
    TooMany { count: usize },
    #[error("{name:?} is not a device name: {what}")]
    Name { name: String, what: &'static str },
}

/// What is wrong with a matrix. Rows and columns are counted from 0, as ranks are.
#[derive(Debug, thiserror::Error)]
pub enum DeviceMatrixError {
    #[error("{bytes} bytes are too long for a device matrix, the limit is {MAX_DEVICE_FILE_BYTES}")]
    TooLong { bytes: usize },
    #[error("the device matrix is not JSON: {source}")]
    Syntax { source: serde_json::Error },
    #[error("the device matrix is {found}, not a list of rows")]
    NotAList { found: &'static str },
    #[error("the device matrix has no rows")]
    Empty,
    #[error("the device matrix has {ranks} rows, the limit is {MAX_RANKS} ranks")]
    TooManyRanks { ranks: usize },
    #[error("row {row} of the device matrix is {found}, not a list of cells")]
    NotARow { row: usize, found: &'static str },
    #[error("row {row} of the device matrix has {cells} cells, but there are {ranks} rows")]
    NotSquare { row: usize, cells: usize, ranks: usize },
    #[error("row {row}, column {row} of the device matrix is not null, but a rank has no cable to itself")]
    Diagonal { row: usize },
    #[error("row {row}, column {column} of the device matrix: {source}")]
    Cell { row: usize, column: usize, source: WiresError },
}

impl Advice for DeviceMatrixError {
    fn hints(&self) -> Vec<String> {
        let hint = match self {
            Self::Cell { .. } => {
                "write null, a name such as \"rdma_en5\" or a list such as [\"rdma_en5\", \"rdma_en4\"]; `ibv_devices` lists the names of a host"
            }
            Self::Diagonal { .. } => "write null on the diagonal",
            _ => {
                "a device matrix has a row for each rank and in it a cell for each rank, such as [[null, \"rdma_en5\"], [\"rdma_en5\", null]]"
            }
        };
        vec![hint.to_owned()]
    }
}

impl DeviceMatrix {
    /// `rows[i][j]`: the devices of rank i that lead to rank j.
    pub fn new(rows: Vec<Vec<Vec<String>>>) -> Result<Self, DeviceMatrixError> {
        let ranks = rows.len();
        if ranks == 0 {
            return Err(DeviceMatrixError::Empty);
        }
        if ranks > MAX_RANKS {
            return Err(DeviceMatrixError::TooManyRanks { ranks });
        }
        for (row, cells) in rows.iter().enumerate() {
            if cells.len() != ranks {
                return Err(DeviceMatrixError::NotSquare { row, cells: cells.len(), ranks });
            }
            for (column, names) in cells.iter().enumerate() {
                check_wires(names).map_err(|source| DeviceMatrixError::Cell { row, column, source })?;
            }
            if !cells[row].is_empty() {
                return Err(DeviceMatrixError::Diagonal { row });
            }
        }
        Ok(Self { rows })
    }

    /// The part of the matrix for some of the ranks, in this order.
    ///
    /// # Panics
    /// If there is no such rank.
    pub fn between(&self, ranks: &[usize]) -> DeviceMatrix {
        let row = |from: &usize| ranks.iter().map(|to| self.rows[*from][*to].clone()).collect();
        DeviceMatrix { rows: ranks.iter().map(row).collect() }
    }

    /// Reads the text of a device file.
    pub fn parse(text: &str) -> Result<Self, DeviceMatrixError> {
        if text.len() > MAX_DEVICE_FILE_BYTES {
            return Err(DeviceMatrixError::TooLong { bytes: text.len() });
        }
        let value: Value = serde_json::from_str(text).map_err(|source| DeviceMatrixError::Syntax { source })?;
        Self::from_value(&value)
    }

    fn from_value(value: &Value) -> Result<Self, DeviceMatrixError> {
        let Value::Array(values) = value else {
            return Err(DeviceMatrixError::NotAList { found: kind(value) });
        };
        let mut rows = Vec::with_capacity(values.len());
        for (row, value) in values.iter().enumerate() {
            let Value::Array(cells) = value else {
                return Err(DeviceMatrixError::NotARow { row, found: kind(value) });
            };
            let wires = |(column, cell)| {
                wires_from_json(cell).map_err(|source| DeviceMatrixError::Cell { row, column, source })
            };
            rows.push(cells.iter().enumerate().map(wires).collect::<Result<_, _>>()?);
        }
        Self::new(rows)
    }

    /// The text that [`DeviceMatrix::parse`] reads back to the same matrix, on one line.
    pub fn to_json(&self) -> String {
        self.to_value().to_string()
    }

    fn to_value(&self) -> Value {
        let row = |cells: &Vec<Vec<String>>| Value::Array(cells.iter().map(|names| wires_to_json(names)).collect());
        Value::Array(self.rows.iter().map(row).collect())
    }

    /// The number of ranks.
    pub fn world(&self) -> usize {
        self.rows.len()
    }

    /// The devices of rank `i` that lead to rank `j`; none where there is no cable.
    ///
    /// # Panics
    /// If `i` or `j` is not below [`DeviceMatrix::world`].
    pub fn wires(&self, i: usize, j: usize) -> &[String] {
        &self.rows[i][j]
    }

    pub fn shape(&self) -> Shape {
        if self.missing_for_mesh().is_empty() {
            Shape::Mesh
        } else if self.missing_for_ring().is_empty() {
            Shape::Ring
        } else {
            Shape::Neither
        }
    }

    /// The pairs (i, j), i below j, that keep this from being a mesh: no cable, or not as many one
    /// way as the other.
    pub fn missing_for_mesh(&self) -> Vec<(usize, usize)> {
        let pairs = (0..self.world()).flat_map(|i| (i + 1..self.world()).map(move |j| (i, j)));
        pairs.filter(|&(i, j)| self.count(i, j) == 0 || self.count(i, j) != self.count(j, i)).collect()
    }

    /// The pairs (i, i + 1 mod N) that keep this from being a ring: fewer cables, one way or the
    /// other, than the best wired neighbours have, or none. Also tells whether a mesh may be run as
    /// a ring.
    pub fn missing_for_ring(&self) -> Vec<(usize, usize)> {
        let world = self.world();
        // With 2 ranks the next one is also the one before, and the pair must not come twice; 1
        // rank has no neighbour.
        let pairs = if world > 2 { world } else { world - 1 };
        let pairs: Vec<_> = (0..pairs).map(|i| (i, (i + 1) % world)).collect();
        let cables = |&(i, j): &(usize, usize)| [self.count(i, j), self.count(j, i)];
        let most = pairs.iter().flat_map(cables).max().unwrap_or(0).max(1);
        pairs.into_iter().filter(|pair| cables(pair).iter().any(|&count| count < most)).collect()
    }

    /// Whether each rank is wired to the next one, among each `length` ranks that follow each other, and somewhere the
    /// last of them is not wired to the first: a ring would lead over a cable that is not there. Two ranks are each
    /// other's neighbours both ways, and never a chain.
    pub fn is_chain(&self, length: usize) -> bool {
        let is_wired = |i: usize, j: usize| self.count(i, j) > 0 && self.count(j, i) > 0;
        let firsts = || (0..self.world()).step_by(length.max(1));
        let is_line = |first: usize| (first + 1..first + length).all(|rank| is_wired(rank - 1, rank));
        length > 2
            && self.world().is_multiple_of(length)
            && firsts().all(is_line)
            && !firsts().all(|first| is_wired(first + length - 1, first))
    }

    /// The cables of a pair in words, for messages about missing ones: "no cable between rank 1 and
    /// rank 3".
    pub fn cables_between(&self, i: usize, j: usize) -> String {
        let cables = |count| if count == 1 { "1 cable".to_owned() } else { format!("{count} cables") };
        match (self.count(i, j), self.count(j, i)) {
            (0, 0) => format!("no cable between rank {i} and rank {j}"),
            (there, back) if there == back => format!("{} between rank {i} and rank {j}", cables(there)),
            (there, 0) => format!("{} from rank {i} to rank {j} but none back", cables(there)),
            (0, back) => format!("{} from rank {j} to rank {i} but none back", cables(back)),
            (there, back) => format!("{} from rank {i} to rank {j} but {back} back", cables(there)),
        }
    }

    fn count(&self, i: usize, j: usize) -> usize {
        self.wires(i, j).len()
    }
}

/// In the form of MLX's device file, as [`DeviceMatrix::to_json`] writes it.
impl Serialize for DeviceMatrix {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.to_value().serialize(serializer)
    }
}

/// Checks what [`DeviceMatrix::parse`] checks.
impl<'de> Deserialize<'de> for DeviceMatrix {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        Self::from_value(&value).map_err(D::Error::custom)
    }
}

/// A cell: null and the empty list are no cable, a text is one. Whether this host has such devices
/// is not looked at.
pub fn wires_from_json(cell: &Value) -> Result<Vec<String>, WiresError> {
    let names = match cell {
        Value::Null => Vec::new(),
        Value::String(name) => vec![name.clone()],
        Value::Array(names) => {
            // Before anything is copied.
            if names.len() > MAX_NAMES_PER_CELL {
                return Err(WiresError::TooMany { count: names.len() });
            }
            let name = |name: &Value| match name {
                Value::String(name) => Ok(name.clone()),
                other => Err(WiresError::Type { found: format!("a list with {}", kind(other)) }),
            };
            names.iter().map(name).collect::<Result<_, _>>()?
        }
        other => return Err(WiresError::Type { found: kind(other).to_owned() }),
    };
    check_wires(&names)?;
    Ok(names)
}

/// The shortest form that [`wires_from_json`] reads back: null, a name or a list of names.
pub fn wires_to_json(names: &[String]) -> Value {
    match names {
        [] => Value::Null,
        [name] => Value::from(name.as_str()),
        names => names.iter().map(String::as_str).collect(),
    }
}

fn check_wires(names: &[String]) -> Result<(), WiresError> {
    if names.len() > MAX_NAMES_PER_CELL {
        return Err(WiresError::TooMany { count: names.len() });
    }
    let fault = |name: &str| {
        if name.is_empty() {
            return Some("it is empty");
        }
        if name.len() > MAX_NAME_BYTES {
            return Some("it is longer than 64 bytes");
        }
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        (!name.bytes().all(is_plain)).then_some("it has a character other than letters, digits, '_', '.' and '-'")
    };
    for name in names {
        if let Some(what) = fault(name) {
            return Err(WiresError::Name { name: name.chars().take(MAX_NAME_BYTES).collect(), what });
        }
    }
    Ok(())
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
