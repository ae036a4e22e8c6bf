// A GGUF file, mapped into memory: its metadata and where its tensors lie. Nothing of it is copied.
//
// Every length and offset of the file is checked against its size before it is used, so a damaged or hostile file ends
// in one FileError and nothing is read past the end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace limbeck {

// The text with whatever is no printable ASCII as '?': it may quote a damaged file.
std::string printable(std::string text);

struct FileError : std::runtime_error {
    explicit FileError(const std::string& text) : std::runtime_error(printable(text)) {}
};

// A file as read-only memory.
class MappedFile {
 public:
    explicit MappedFile(const std::string& path);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    const uint8_t* data() const { return data_; }
    size_t size() const { return size_; }
    // These bytes are not needed again soon: their memory may go.
    void release(const uint8_t* from, size_t bytes) const;

 private:
    const uint8_t* data_ = nullptr;
    size_t size_ = 0;
};

enum class ValueType : uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };

// A value of the metadata: a view of the file. For an array, `count` elements of type `element` from `data` on.
struct MetaValue {
    ValueType type = ValueType::u8, element = ValueType::u8;
    uint64_t count = 1;
    const uint8_t* data = nullptr;
    const uint8_t* end = nullptr;
};

struct TensorInfo {
    std::string name;
    std::vector<uint64_t> shape;  // innermost first, as the file has it
    uint32_t type = 0;
    const uint8_t* data = nullptr;
    size_t bytes = 0;
};

class GgufFile {
 public:
    explicit GgufFile(const std::string& path);

    const std::string& path() const { return path_; }
    const MappedFile& mapped() const { return file_; }
    const std::map<std::string, MetaValue>& values() const { return values_; }
    const std::map<std::string, TensorInfo>& tensors() const { return tensors_; }

    bool has(const std::string& key) const { return values_.count(key) > 0; }
    // A number or text of the metadata; a FileError says what is missing, or of another type.
    uint64_t whole(const std::string& key) const;
    uint64_t whole(const std::string& key, uint64_t otherwise) const { return has(key) ? whole(key) : otherwise; }
    double real(const std::string& key) const;
    double real(const std::string& key, double otherwise) const { return has(key) ? real(key) : otherwise; }
    bool truth(const std::string& key, bool otherwise) const;
    std::string text(const std::string& key) const;
    std::vector<double> numbers(const std::string& key) const;

    const TensorInfo* find(const std::string& name) const;

 private:
    std::string path_;
    MappedFile file_;
    std::map<std::string, MetaValue> values_;
    std::map<std::string, TensorInfo> tensors_;
};

// Bytes that `count` elements of a GGUF type take; 0 for a type that is not read here.
uint64_t bytes_of(uint32_t type, uint64_t count);
const char* type_name(uint32_t type);

// One number at `data`; its size is the type's.
double number_at(ValueType type, const uint8_t* data);
size_t size_of(ValueType type);

}  // namespace limbeck
