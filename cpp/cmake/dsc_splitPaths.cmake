# Sets dsc_split_INCLUDE_DIR and dsc_split_HEADERS_VERSION.
# The headers lie beside this folder in a checkout and in a wheel, and three folders up once they are installed.
foreach(_dsc_split_up IN ITEMS .. ../../..)
  get_filename_component(dsc_split_INCLUDE_DIR "${CMAKE_CURRENT_LIST_DIR}/${_dsc_split_up}/include" ABSOLUTE)
  if(EXISTS "${dsc_split_INCLUDE_DIR}/dsc_split/result.hpp")
    break()
  endif()
endforeach()
unset(_dsc_split_up)

# The version is written down in one place, for the compiler.
file(STRINGS "${dsc_split_INCLUDE_DIR}/dsc_split/result.hpp" dsc_split_HEADERS_VERSION
     REGEX "^#define DSC_SPLIT_VERSION_(MAJOR|MINOR|PATCH) [0-9]+$")
list(TRANSFORM dsc_split_HEADERS_VERSION REPLACE "^.* " "")
list(JOIN dsc_split_HEADERS_VERSION "." dsc_split_HEADERS_VERSION)
