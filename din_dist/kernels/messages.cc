// Packs rows of several tables into one message, in parts for the ranks that sum them, and reads such messages. Only
// distributed/gradients.py calls it.
//
// A message consists of parts of 32-bit words. A part has:
// - the number of words up to the next part,
// - the number of rows of each table,
// - the ids of all these rows,
// - their values, those of each table rounded up to whole words.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tensorflow.h"

namespace din {
namespace {

int64_t Words(int64_t bytes) { return (bytes + 3) / 4; }

// Horovod negotiates again, in several rounds, if a message has another length than before. A message that has become
// shorter is therefore padded, unless it is much shorter.
class Length {
 public:
  int64_t AtLeast(int64_t words) {
    int64_t length = length_.load();
    if (words > length || words < length / 2) {
      int64_t unit = 64;
      while (16 * unit <= words) unit *= 2;
      length = (words / unit + 1) * unit;
      length_.store(length);
    }
    return length;
  }

 private:
  std::atomic<int64_t> length_{0};  // atomic, because calls may overlap
};

class PackRows {
 public:
  explicit PackRows(TF_OpKernelConstruction* construction)
      : num_tables_(static_cast<int>(Attribute(construction, "N"))) {}

  void Compute(TF_OpKernelContext* context) {
    const Tensor given = Tensor::Input(context, 0);
    Require(given.Size() == 1 && *given.Data<const int32_t>() > 0, "a message has at least one part");
    const int64_t num_parts = *given.Data<const int32_t>();
    std::vector<Tensor> inputs;
    std::vector<Table> tables(num_tables_);
    for (int t = 0; t < num_tables_; ++t) {
      Table& table = tables[t];
      inputs.push_back(Tensor::Input(context, 1 + t));
      const int64_t count = inputs.back().Size();
      table.ids = inputs.back().Data<const int32_t>();
      inputs.push_back(Tensor::Input(context, 1 + num_tables_ + t));
      const std::vector<int64_t> shape = inputs.back().Shape();
      Require(shape.size() == 2 && shape[0] == count, "there must be an id for each row");
      table.rows = inputs.back().Data<const char>();
      table.row_bytes = count ? inputs.back().Bytes() / count : 0;
      table.counts.assign(num_parts, 0);
      table.part_of.reserve(count);
      for (int64_t i = 0; i < count; ++i) {
        Require(table.ids[i] >= 0, "ids of rows must not be negative");
        table.part_of.push_back(static_cast<int32_t>(table.ids[i] % num_parts));
        ++table.counts[table.part_of.back()];
      }
    }
    std::vector<int64_t> lengths(num_parts, 1 + num_tables_);
    int64_t words = 0;
    for (int64_t part = 0; part < num_parts; ++part) {
      for (const Table& table : tables) {
        lengths[part] += table.counts[part] + Words(table.counts[part] * table.row_bytes);
      }
      words += lengths[part];
    }
    const int64_t room = length_.AtLeast(words);
    Require(room < int64_t{1} << 31, "a message must be shorter than 8 GiB");
    if (num_parts == 1) lengths[0] = room;
    const Tensor message = Tensor::Output(context, 0, TF_INT32, {room});
    auto* const to = message.Data<int32_t>();
    std::fill(to + words, to + room, 0);
    const Tensor told = Tensor::Output(context, 1, TF_INT32, {num_parts});
    std::copy(lengths.begin(), lengths.end(), told.Data<int32_t>());

    std::vector<int32_t*> at(num_parts);  // where the ids of the next table go
    for (int64_t part = 0, begin = 0; part < num_parts; begin += lengths[part++]) {
      to[begin] = static_cast<int32_t>(lengths[part]);
      for (int t = 0; t < num_tables_; ++t) to[begin + 1 + t] = static_cast<int32_t>(tables[t].counts[part]);
      at[part] = to + begin + 1 + num_tables_;
    }
    for (const Table& table : tables) {
      for (size_t i = 0; i < table.part_of.size(); ++i) *at[table.part_of[i]]++ = table.ids[i];
    }
    for (const Table& table : tables) {
      std::vector<char*> next(num_parts);
      for (int64_t part = 0; part < num_parts; ++part) {
        next[part] = reinterpret_cast<char*>(at[part]);
        at[part] += Words(table.counts[part] * table.row_bytes);
        if (at[part] != reinterpret_cast<int32_t*>(next[part])) at[part][-1] = 0;  // a word may be partly used
      }
      for (size_t i = 0; i < table.part_of.size(); ++i) {
        char*& row = next[table.part_of[i]];
        std::memcpy(row, table.rows + i * table.row_bytes, table.row_bytes);
        row += table.row_bytes;
      }
    }
  }

 private:
  struct Table {
    const int32_t* ids;
    const char* rows;
    int64_t row_bytes;
    std::vector<int32_t> part_of;  // of each row
    std::vector<int64_t> counts;   // rows in each part
  };

  const int num_tables_;
  Length length_;
};

class UnpackRows {
 public:
  explicit UnpackRows(TF_OpKernelConstruction* construction)
      : widths_(static_cast<size_t>(Attribute(construction, "N"))) {
    Status status;
    TF_OpKernelConstruction_GetAttrInt64List(construction, "widths", widths_.data(), static_cast<int>(widths_.size()),
                                             status);
    status.Check();
    TF_OpKernelConstruction_GetAttrType(construction, "T", &type_, status);
    status.Check();
  }

  void Compute(TF_OpKernelContext* context) {
    const Tensor message = Tensor::Input(context, 0);
    const auto* const from = message.Data<const int32_t>();
    const auto num_tables = static_cast<int64_t>(widths_.size());
    const auto row_bytes = [&](int64_t t) { return widths_[t] * static_cast<int64_t>(TF_DataTypeSize(type_)); };
    std::vector<int64_t> totals(num_tables, 0), parts;
    for (int64_t begin = 0; begin < message.Size(); begin += from[begin]) {
      parts.push_back(begin);
      int64_t words = 1 + num_tables;
      bool whole = begin + words <= message.Size();
      for (int64_t t = 0; whole && t < num_tables; ++t) {
        const int64_t count = from[begin + 1 + t];
        whole = count >= 0;
        words += count + Words(count * row_bytes(t));
        totals[t] += count;
      }
      Require(whole && words <= from[begin] && begin + from[begin] <= message.Size(),
              "a message of rows must be whole");
    }
    std::vector<Tensor> outputs;
    std::vector<int32_t*> ids;
    std::vector<char*> rows;
    for (int64_t t = 0; t < num_tables; ++t) {
      outputs.push_back(Tensor::Output(context, static_cast<int>(t), TF_INT32, {totals[t]}));
      ids.push_back(outputs.back().Data<int32_t>());
    }
    for (int64_t t = 0; t < num_tables; ++t) {
      outputs.push_back(Tensor::Output(context, static_cast<int>(num_tables + t), type_, {totals[t], widths_[t]}));
      rows.push_back(outputs.back().Data<char>());
    }
    for (const int64_t begin : parts) {
      const int32_t* const counts = from + begin + 1;
      const int32_t* at = counts + num_tables;
      for (int64_t t = 0; t < num_tables; at += counts[t++]) ids[t] = std::copy_n(at, counts[t], ids[t]);
      for (int64_t t = 0; t < num_tables; ++t) {
        const int64_t bytes = counts[t] * row_bytes(t);
        std::memcpy(rows[t], at, bytes);
        rows[t] += bytes;
        at += Words(bytes);
      }
    }
  }

 private:
  std::vector<int64_t> widths_;
  TF_DataType type_ = TF_FLOAT;
};

const bool kRegistered =
    Kernel<PackRows>::Register("DinDistPackRows", {"num_parts: int32", "row_ids: N * int32", "rows: N * T"},
                               {"message: int32", "lengths: int32"}, {"N: int", "T: {float, uint16}"}) &&
    Kernel<UnpackRows>::Register("DinDistUnpackRows", {"message: int32"}, {"row_ids: N * int32", "rows: N * T"},
                                 {"N: int", "T: {float, uint16}", "widths: list(int)"});

}  // namespace
}  // namespace din
